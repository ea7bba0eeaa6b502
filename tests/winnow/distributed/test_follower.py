import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

from tests.deadlines import SOON_S
from winnow.distributed.commands import Load
from winnow.distributed.pipes import send


def test_ends_with_rank_0_in_whatever_it_does(tmp_path: Path) -> None:
    """Here it waits for a rank 0 that never joins the group."""
    ours, theirs = Pipe()
    news, their_news = Pipe()
    fds = [theirs.fileno(), their_news.fileno()]
    command = [sys.executable, "-m", "winnow.distributed.follower", *map(str, fds)]
    with news, their_news, subprocess.Popen(command, pass_fds=fds) as process:
        theirs.close()
        send(ours, Load(1, 2, str(tmp_path / "group"), 1, "no-model", {"device": "cpu"}))
        while not (tmp_path / "group").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert process.poll() is None
        ours.close()
        assert process.wait(SOON_S) == 0
