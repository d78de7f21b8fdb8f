"""Lines on the terminal."""

from __future__ import annotations

import pytest

from linearsr.cli.report import complain, say
from linearsr.errors import InputError


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("a\x1b[2Jb\x9b1m.png\tis\nfine")
    complain(InputError("c\rd\x07.png: damaged\nlinearsr: all is well"), 1)
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\x9b1m.png\tis\nfine\n"
    assert err == "linearsr: c d\\x07.png: damaged linearsr: all is well\n"
