"""The report: one page about a stage's output, for people who decide on a release."""
