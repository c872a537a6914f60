"""What a run that is kept on disk tells as finished is there, should the server be killed at that moment."""

from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.scripts import result_of


def test_no_chunk_is_told_as_finished_before_it_is_on_disk(tmp_path):
    runs = result_of("run_kept.py", HOST, tmp_path)
    assert len(runs) == 6
    for name, pairs in runs.items():
        assert all(told <= there for told, there in pairs), (name, pairs)
        assert [told for told, _ in pairs] == sorted(told for told, _ in pairs)
        assert pairs[-1][0] >= 2, (name, pairs)  # it does tell
