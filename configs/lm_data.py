"""Where the larger configs read text: your own files, or the embedded data."""

from moex.config import ConfigError, nearest
from moex.data.pipeline import Data
from moex.data.sources import PythonStdlib, Text
from moex.data.tokenizer import Bpe

CHOICES = {"data=text": "your files", "data=stdlib": "the embedded data"}


def get_data(arg: str = "") -> Data:
    """`Data` for the config argument `arg`: "", "data=text" or "data=stdlib".

    The paths of `data=text` are set on the command line:
    `--config.data.sources[0].paths='("/data/*.txt",)'`.
    """
    arg = arg or "data=text"
    if arg not in CHOICES:
        raise ConfigError(
            f"config argument {arg!r}: must be one of {', '.join(CHOICES)}."
            f"{nearest(arg, CHOICES)}"
        )
    if arg == "data=stdlib":
        return Data(sources=(PythonStdlib(),), tokenizer=Bpe(vocab=8192))
    return Data(sources=(Text(paths=("data/*.txt",)),), tokenizer=Bpe(vocab=32_000))
