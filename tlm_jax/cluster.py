"""Tasks on a Ray cluster, behind the interface of `concurrent.futures`.

Work that is not one program (units of text, cells of a sweep, checkpoints to evaluate) goes to an
executor. The one here hands it to Ray, which finds a node that has what a task needs, and repeats
the task elsewhere if its node dies. All nodes must have tlm-jax and see the same files under the
same paths.
"""

import concurrent.futures
import logging
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

from tlm_jax.validation import UserError

LOCAL = "local"
_SCHEME = "ray://"
_RETRIES = 5
"""How often a task may lose its node; a task that raises an error is not repeated."""


def check(engine: str) -> None:
    """Refuses an unknown engine.

    Raises:
      UserError: it is neither "local", "ray" nor "ray://HOST:PORT".
    """
    named = engine.startswith(_SCHEME) and engine != _SCHEME
    if engine not in (LOCAL, "ray") and not named:
        raise UserError(f"--engine {engine!r} must be {LOCAL}, ray or {_SCHEME}HOST:PORT")


class RayExecutor(concurrent.futures.Executor):
    """Runs functions of tlm-jax as tasks of a Ray cluster.

    Args:
      engine: "ray" connects to the cluster that RAY_ADDRESS names or this machine belongs to, and
        else starts one on this machine; "ray://HOST:PORT" is the address of a cluster's client
        server.
      gpus: of each task; a fraction lets several tasks share one.

    Raises:
      UserError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, engine: str, *, gpus: float = 0.0) -> None:
        check(engine)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray: pip install 'tlm-jax[ray]'") from None
        self._ray = ray
        if not ray.is_initialized():
            address = engine if engine.startswith(_SCHEME) else None
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of many types, by what answers at the address
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"cannot reach the Ray cluster of --engine {engine}: {reason}"
                ) from error
        self._remote = ray.remote(_task).options(
            num_cpus=1, num_gpus=gpus, max_retries=_RETRIES, name="tlm"
        )
        # XLA's threads on a CPU: as many as the CPUs that a task asks for, and not the machine's
        self._environment = {} if gpus else {"NPROC": "1"}
        self._refs: dict[concurrent.futures.Future[Any], Any] = {}

    def submit(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Starts `function(*args, **kwargs)` on some node.

        Returns:
          A future. Its result raises what the function raised, `CancelledError` once the task was
          cancelled, and UserError if Ray could not run it.
        """
        ref = self._remote.remote(os.getcwd(), self._environment, function, args, kwargs)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        self._refs[future] = ref
        ref.future().add_done_callback(lambda theirs: self._finish(future, theirs))
        return future

    def cancel(self) -> None:
        """Raises KeyboardInterrupt in tasks that run, and drops those that wait."""
        for ref in list(self._refs.values()):
            self._ray.cancel(ref)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for the tasks, of which `cancel_futures` cancels those that are not finished."""
        if cancel_futures:
            self.cancel()
        if wait:
            concurrent.futures.wait(list(self._refs))

    def _finish(
        self, future: concurrent.futures.Future[Any], theirs: concurrent.futures.Future[Any]
    ) -> None:
        self._refs.pop(future, None)
        error = theirs.exception()
        if error is None:
            future.set_result(theirs.result())
        else:
            future.set_exception(self._translated(error))

    def _translated(self, error: BaseException) -> BaseException:
        errors = self._ray.exceptions
        cause = getattr(error, "cause", error)
        if isinstance(error, errors.TaskCancelledError) or isinstance(
            cause, errors.TaskCancelledError
        ):
            return concurrent.futures.CancelledError()
        if isinstance(cause, UserError | OSError):
            return cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(cause).__name__
        return UserError(f"a task on the Ray cluster failed: {reason}")


def _task(
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """In a worker: calls the function in the folder in which it was asked for.

    Ray cancels a task by SIGINT, which a cluster that was started in the background ignores.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    if pathlib.Path(folder).is_dir():
        os.chdir(folder)
    return function(*args, **kwargs)
