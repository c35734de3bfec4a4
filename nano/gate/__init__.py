"""The accuracy gate: a baseline and a candidate, on text or on tasks, compared and judged against limits."""
