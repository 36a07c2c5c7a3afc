"""`optimum-cli export gte`: gte-export as a command of optimum.

optimum-cli imports every file of the namespace optimum.commands.register (PEP 420: there is no `__init__.py` up to
here). It makes the parsers of all commands whenever it starts, so this imports neither torch nor an engine for that.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class GteExportCommand(BaseOptimumCLICommand):
    """The command, with all options of gte-export."""

    COMMAND = CommandInfo(name="gte", help="Export a text encoder to a bundle that is compared with PyTorch.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options to optimum's parser."""
        from gte_deploy.exporters.cli import add_export_arguments, format_in

        add_export_arguments(parser, format_in(sys.argv[1:]))

    def run(self) -> None:
        """Export, and leave with the exit code of gte-export."""
        from gte_deploy.exporters.cli import run_export

        sys.exit(run_export(self.args))


REGISTER_COMMANDS = [(GteExportCommand, ExportCommand)]
