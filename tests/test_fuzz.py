"""A few hundred mutated files; tests/fuzz_files.py as a script reads any number."""

import pytest

from tests.fuzz_files import KINDS, fuzz


@pytest.mark.filterwarnings("ignore")  # of torch, about tensors without elements
def test_mutated_files_are_taken_or_refused_in_one_line(tmp_path):
    outcome = fuzz(40, 0, tmp_path)
    assert not outcome.faults
    assert all(outcome.refused[name] for name in KINDS if name != "run's addition")  # the run goes on before it
    assert all(outcome.taken[name] for name in ("config", "torch file"))  # the good ones can be read
    assert not any(outcome.taken[name] for name in KINDS if "code" in name)
