"""`moex init`."""

import shlex
import shutil

from moex import hints
from moex.commands import Verb
from moex.config.arguments import path
from moex.config.base import ConfigError


class Command(Verb):
    """Make a folder for runs of your own: a config, a router, its test, a README.

    The run trains as it is, and the router is yours to change.
    """

    examples = """
    Examples:
      moex init my_router
    """
    refuses_config = "takes none"

    def add(self, parser):
        parser.add_argument("folder", type=path, help="a new folder, or an empty one")

    def run(self, args, config_args):
        from moex.config.shipped import FOLDER, TEMPLATE

        folder = args.folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: is no empty folder; give a new one.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in TEMPLATE:
            shutil.copyfile(FOLDER / "template" / name, folder / name)
        print(f"{folder}: made {', '.join(TEMPLATE)}")
        print(f"train it: cd {shlex.quote(str(folder.absolute()))}")
        words = ("train", "--config=config.py", "--workdir=runs/first")
        print(f"          {hints.command('moex', *words, folder=folder)}")
