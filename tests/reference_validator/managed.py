"""A reference validator with its EliminationManager, in either mode."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from reference_validator.adapter import plug_in
from reference_validator.validator import ReferenceValidator
from shmelim import EliminationManager

if TYPE_CHECKING:
    from shmelim.eliminations.validator.collaborators import Collaborators


def manager_of(
    collaborators: Collaborators, environment: Any, *, running_unit_tests: bool, **options: Any
) -> EliminationManager:
    """A manager that holds these collaborators."""
    return EliminationManager(
        **collaborators.as_arguments(),
        running_unit_tests=running_unit_tests,
        environment=environment,
        enable_health_check=False,
        **options,
    )


class Managed:
    """A validator in a directory, its manager, and what a test wants to know of both.

    Parameters
    ----------
    mode
        ``"direct"`` or ``"rpc"``.
    name
        Of the table, in RPC mode.
    directory
        Where the validator and the state live.
    live, figures
        As for the validator and its environment.
    start_method
        Of the server's process: the quickest, unless it matters; ``None`` is the default of a manager.

    """

    def __init__(
        self,
        mode: str,
        name: str,
        directory: Path,
        *,
        live: bool = False,
        start_method: str | None = "fork",
        **figures: Any,
    ) -> None:
        self.mode = mode
        self.name = name
        self.directory = directory
        self._live = live
        self._figures = figures
        self._start_method = start_method
        self._runtime = Path(tempfile.mkdtemp(prefix="shmelim-"))
        self._open()

    def _open(self) -> None:
        self.validator = ReferenceValidator(self.directory, live=self._live)
        self.collaborators, self.environment = plug_in(self.validator, **self._figures)
        options: dict[str, Any] = {"state_dir": self.directory / "state", "durability": "process"}
        if self.mode == "rpc":
            options |= {"name": self.name, "port": None, "runtime_base": self._runtime, "files": "lagged"}
            options["start_method"] = self._start_method
        self.manager = manager_of(
            self.collaborators, self.environment, running_unit_tests=self.mode == "direct", **options
        )

    def tick(self, milliseconds: int = 300_001) -> None:
        """Let time pass, by default until a tick is due, and ask for one."""
        self.validator.pass_time(milliseconds)
        self.manager.process_eliminations()

    def restart(self) -> None:
        """End everything in this process, and begin anew from what is on disk."""
        self.close(final=False)
        self._open()

    @property
    def debts(self) -> list[dict[str, Any]]:
        return list(self.manager._server_proxy.get_debts_rpc())

    @property
    def reasons(self) -> dict[str, str]:
        """Why each eliminated miner was."""
        return {hotkey: row["reason"] for hotkey, row in self.manager.get_eliminations_dict().items()}

    @property
    def alerts(self) -> list[str]:
        """What Slack was told of errors."""
        return [text for level, text in self.validator.slack.messages if level == "error"]

    def close(self, *, final: bool = True) -> None:
        server = self.manager._server_proxy
        self.manager.shutdown()
        if self.mode == "direct" and server is not None:
            server.close()
        if final:
            shutil.rmtree(self._runtime, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
