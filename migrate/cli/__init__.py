# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: ``xen-postcopy``.

Each group of commands is one file.  The imports of a command happen when it runs, so that
``--help`` is quick.  An error that a user can correct is one line on standard error, with exit
status 1.  Wrong options have exit status 2, an interruption 130, and a sender that ended during a
migration 3.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from typing import Any

import click

from migrate import __version__

COMMANDS = {
    "migrate": "migrate.cli.migrate",
    "estimate": "migrate.cli.estimate",
    "evacuate": "migrate.cli.evacuate.command",
    "list": "migrate.cli.migrations",
    "show": "migrate.cli.migrations",
    "report": "migrate.cli.report.command",
    "watch": "migrate.cli.migrations",
    "postcopy-now": "migrate.cli.adjust",
    "set": "migrate.cli.adjust",
    "pause": "migrate.cli.adjust",
    "resume": "migrate.cli.adjust",
    "cancel": "migrate.cli.migrations",
    "reconnect": "migrate.cli.migrations",
    "decide": "migrate.cli.migrations",
    "init": "migrate.cli.init",
    "preflight": "migrate.cli.preflight",
    "restart-idle": "migrate.cli.restart",
    "sender": "sender.command",
    "receiver": "receiver.command",
    "simulated-host": "migrate.cli.daemons",
    "simulated-guest": "migrate.cli.guests",
    "loopback": "migrate.cli.loopback",
}


class LazyGroup(click.Group):
    """Finds a command's module by :data:`COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[name])
        command: click.Command = getattr(module, name.replace("-", "_") + "_command")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Raises :class:`InterruptedMigrationError` at Ctrl-C; click itself would print an empty
        line first.
        """
        from migrate.errors import InterruptedMigrationError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedMigrationError("interrupted") from None


def show_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from migrate.cli.text import echo
        from xenbackend.release import in_words

        echo(f"xen-postcopy, version {__version__}\n{in_words()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version,
    help="Show the version, and the Xen for which it was built and on which it runs.",
)  # fmt: skip
def cli() -> None:
    """Postcopy live migration for Xen.

    A guest that writes memory faster than the network carries it cannot be moved by precopy without
    a long freeze.  Here its vCPUs move first, and its missing pages follow: a page that the guest
    touches at once, all others in the background.

    \b
    Try it on this machine, without Xen:
        xen-postcopy loopback --memory 1G --vcpus 2

    \b
    Between two hosts, on which the package has started the daemons:
        xen-postcopy init HOST1 HOST2     (makes certificates and configurations)
        HOST1#  xen-postcopy migrate DOMAIN HOST2
    """


def main() -> None:
    """The entry point."""
    from migrate.cli.text import echo
    from migrate.errors import InterruptedMigrationError, MigrationError, UnattendedMigrationError
    from migrate.streams import in_words, open_standard_streams
    from xenbackend.errors import GuestOptionError, XenError

    open_standard_streams()

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        echo("xen-postcopy: interrupted", err=True)
        sys.exit(130)
    except InterruptedMigrationError as error:
        echo(f"xen-postcopy: {error}", err=True)
        sys.exit(130)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        echo(text.getvalue().rstrip("\n"), err=True)
        sys.exit(error.exit_code)
    except GuestOptionError as error:
        echo(f"xen-postcopy: {error}", err=True)
        sys.exit(2)
    except (MigrationError, XenError, OSError) as error:
        with contextlib.suppress(OSError):  # the terminal may have been closed
            for note in getattr(error, "__notes__", ()):
                echo(note, err=True)
            echo(f"xen-postcopy: {in_words(error)}", err=True)
        sys.exit(3 if isinstance(error, UnattendedMigrationError) else 1)


if __name__ == "__main__":
    main()
