"""The demo's held-out questions as tasks, one for each capability: answered by greedy generation, checked exactly."""

from __future__ import annotations

from functools import lru_cache

from nano.capabilities import Question, Task
from nano.demo.text import CAPABILITIES, SEED, questions

QUESTIONS = 48
LONGEST_ANSWER = 24
"""More tokens than any right answer has."""


@lru_cache(maxsize=4)
def demo_tasks(each: int = QUESTIONS, seed: int = SEED) -> tuple[Task, ...]:
    """One task for each capability, of `each` different questions that were never trained on.

    Args:
        each: questions of each capability; the first ones of a longer list are those of a shorter one.
        seed: of the world and of the questions.
    """
    asked = questions(seed, each)
    return tuple(
        Task(
            name=f"demo-{group}",
            capability=group,
            metric="exact",
            questions=tuple(Question(q.prompt, (q.answer,)) for q in asked if q.group == group),
            max_new_tokens=LONGEST_ANSWER,
        )
        for group in CAPABILITIES
    )
