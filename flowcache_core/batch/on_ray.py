"""Workers as actors of Ray, one for each GPU of the cluster; on one machine Ray starts by itself."""

import os
from collections.abc import Hashable, Sequence
from typing import Any

from ..errors import UserError, first_line
from .dispatch import Ended
from .host import Failed, Hangs, Host, HostSettings
from .jobs import Job

try:
    import ray
    from ray.exceptions import RayActorError, RayError
except ImportError as error:
    raise UserError("The command batch needs Ray: pip install 'flowcache[ray]'.") from error

BEHIND = 0.02  # seconds in which more jobs may end, and are dealt with together


def those_ended(running: list, seconds: float) -> list:
    """Waits for what ends of what runs, so long at most: the first, and what ends right behind it, for Ray looks at all
    of them each time."""
    ready, _ = ray.wait(running, num_returns=1, timeout=seconds)
    if ready and len(running) > 1:
        ready, _ = ray.wait(running, num_returns=len(running), timeout=BEHIND)
    return ready


class HostWorker:
    """Keeps a ComfyUI, and runs workflows in it; an actor."""

    def __init__(self, settings: HostSettings, threads: int):
        if threads:  # an actor without CPUs of its own has one thread, which its children take over
            os.environ.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
        else:
            os.environ.pop("OMP_NUM_THREADS", None)
        self.settings = settings
        self.host: Host | None = None

    def run(self, graph: dict) -> dict:
        """Runs a workflow; gives its files, reports and error. A server that hangs is replaced, once."""
        for attempt in range(2):
            try:
                self.host = self.host or Host(self.settings)
                outputs = self.host.run(graph)
                reports = [text for node in outputs.values() for text in node.get("text", ()) if isinstance(text, str)]
                return {"files": self.host.files(outputs), "reports": reports, "error": ""}
            except Failed as error:
                return {"files": [], "reports": [], "error": str(error)}
            except Hangs as error:
                assert self.host is not None
                self.host.close()
                self.host = None
                if attempt:
                    return {"files": [], "reports": [], "error": str(error)}
            except UserError as error:
                return {"files": [], "reports": [], "error": str(error)}
        raise AssertionError

    def where(self) -> dict:
        """For tests and the curious: this process, and its server's port and keeper."""
        host = self.host
        return {"pid": os.getpid(), "port": host and host.port, "keeper": host and host.keeper.pid}

    def close(self) -> None:
        """Ends its server."""
        if self.host is not None:
            self.host.close()
            self.host = None


class RayWorkers:
    """Actors, by number.

    Args:
        settings: of their ComfyUIs.
        count: how many; None takes one for each GPU, or one where there is none.
        threads: of each server's arithmetic; 0 leaves it to torch.
        address: of a Ray cluster; None starts Ray here.
    """

    def __init__(self, settings: HostSettings, count: int | None, threads: int = 0, address: str | None = None):
        os.environ.setdefault("RAY_worker_niceness", "0")  # or servers wait behind whatever else the machine does
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            here: dict[str, Any] = {} if address else {"num_cpus": max(count or 1, os.cpu_count() or 1)}
            context = ray.init(address=address or "local", log_to_driver=False, **here)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Cannot reach Ray at {address} ({first_line(error)}); start it with 'ray start'."
            ) from error
        self.dashboard = context.dashboard_url or ""  # address of Ray's dashboard, where it is installed
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.count = count or max(1, gpus)
        room = gpus or int(ray.cluster_resources().get("CPU", 0))
        if self.count > room:
            ray.shutdown()
            kind = "GPUs" if gpus else "processors"
            raise UserError(
                f"{self.count} workers are asked for, and Ray has {room} {kind}; lower --workers, or add nodes."
            )
        self.settings, self.threads = settings, threads
        # An actor that asks for no GPU would see all of them.
        self.asks: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self.actors: dict[Hashable, Any] = {number: self._actor() for number in range(self.count)}
        self.running: dict[Any, Hashable] = {}

    def _actor(self):
        return (
            ray.remote(HostWorker)
            .options(max_restarts=0, max_concurrency=2, **self.asks)
            .remote(self.settings, self.threads)
        )

    def names(self) -> Sequence[Hashable]:
        return list(self.actors)

    def begin(self, worker: Hashable, job: Job) -> None:
        self.running[self.actors[worker].run.remote(job.graph)] = worker

    def ended(self, seconds: float) -> list[Ended]:
        return [self._of(reference) for reference in those_ended(list(self.running), seconds)]

    def _of(self, reference) -> Ended:
        worker = self.running.pop(reference)
        try:
            return Ended(worker, **ray.get(reference))
        except RayActorError as error:
            return Ended(worker, error=f"the worker has ended ({first_line(error)})", lost=True)
        except RayError as error:
            return Ended(worker, error=first_line(error))

    def replace(self, worker: Hashable) -> None:
        self.actors[worker] = self._actor()

    def where(self, worker: Hashable) -> dict:
        """A worker's process, and its server's; also while it works."""
        return ray.get(self.actors[worker].where.remote())

    def close(self) -> None:
        """Ends all servers, then Ray where it was started here."""
        closing = [actor.close.remote() for actor in self.actors.values()]
        ray.wait(closing, num_returns=len(closing), timeout=30)
        ray.shutdown()
