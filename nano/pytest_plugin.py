"""A fixture for teams that gate in pytest; pytest finds it by itself where nanokit is installed.

    def test_the_bundle_has_not_lost_accuracy(nanokit_gate):
        nanokit_gate("ci/baseline.json", "out/bundle", data=["ci/heldout.jsonl"], gate="ci/gate.toml")

Imported at the start of every pytest run in that environment, so it imports nothing but pytest, and does nothing
where the fixture is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nano.gate.compare import Compared

PathLike = str | Path


@pytest.fixture
def nanokit_gate(record_property: Callable[[str, object], None]) -> Callable[..., Compared]:
    """`nanokit_gate(baseline, candidate, data=[...], ...)`: judge, and fail the test where accuracy was lost.

    Takes what `nano.gate.compare.run_compare` takes, paths as text too, relative to where pytest runs. Gives back what
    was compared. Each figure's verdict is a property of the test, so it stands in pytest's JUnit file.
    """

    def judge(baseline: PathLike, candidate: PathLike, data: Sequence[PathLike] = (), **options: Any) -> Compared:
        from nano.errors import NanokitError
        from nano.gate.compare import require_passed, run_compare

        __tracebackhide__ = True
        for name in ("reference", "gate", "task_data"):
            if options.get(name) is not None:
                options[name] = Path(options[name])
        try:
            compared = run_compare(Path(baseline), Path(candidate), data=[Path(path) for path in data], **options)
            for verdict in compared.verdicts:
                record_property(f"nanokit {verdict.name}", f"{verdict.outcome}: {verdict.sentence}")
            require_passed(compared)
        except NanokitError as error:
            pytest.fail(str(error), pytrace=False)
        return compared

    return judge
