"""The command, as tests of conversions call it."""

import pytest

from moex import cli


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: what it prints; a mistake gives its line."""

    def moex(*args):
        capsys.readouterr()
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            assert stop.code == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            return err
        return capsys.readouterr().out

    return moex
