"""The data of the larger configs: your own text files, or the embedded data."""

from moex import Bpe, Data, PythonStdlib, Text
from moex.configs.parse import parse_arg


def get_data(arg: str = "") -> Data:
    """The `Data` for the config argument `arg`: "", "data=text" or "data=stdlib".

    The paths of `data=text` are set on the command line:
    `--config.data.sources[0].paths='("/data/*.txt",)'`.
    """
    if parse_arg(arg, data=("text", "stdlib"))["data"] == "stdlib":
        return Data(sources=(PythonStdlib(),), tokenizer=Bpe(vocab=8192))
    return Data(sources=(Text(paths=("data/*.txt",)),), tokenizer=Bpe(vocab=32_000))
