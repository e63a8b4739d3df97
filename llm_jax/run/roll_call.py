"""A roll call before JAX starts: who is missing, by number and host.

`jax.distributed.initialize` waits for all processes and, when one does not come, aborts every one of them
with a stack trace that names nobody (measured with jax 0.10.2). So process 0 listens first, on the
coordinator's own address, for one line from each of the others, and tells all of them how it went.
"""

import contextlib
import json
import socket
import time
from typing import Any

from llm_jax.errors import ConfigError, UnavailableError

LINE = 4096  # bytes read at a time
SLACK = 5.0  # seconds that process 0 may have started to wait later than the others


def roll_call(coordinator: str, processes: int, index: int, seconds: float) -> list[str]:
    """Host names by number of process, once all of them are there.

    Raises:
      UnavailableError: on every process that is there: some did not come within `seconds`.
      ConfigError: likewise: one came twice, or was told of another number of processes.
    """
    host, _, port = coordinator.rpartition(":")
    where = (host.strip("[]"), int(port))
    me = {"index": index, "host": socket.gethostname(), "processes": processes}
    if processes == 1:
        return [me["host"]]
    answer = _call(where, me, seconds) if index == 0 else _report(where, me, seconds)
    if answer["problem"]:
        raise (UnavailableError if answer["late"] else ConfigError)(answer["problem"])
    return answer["hosts"]


def _call(where: tuple[str, int], me: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Process 0: waits for the others, then tells them."""
    present = {0: me["host"]}
    problem = ""
    count, deadline = me["processes"], time.monotonic() + seconds
    with contextlib.ExitStack() as open_until_the_end:
        waiting = []
        try:
            listener = open_until_the_end.enter_context(
                socket.create_server(
                    where,
                    family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET,
                    backlog=min(count, 1024),
                )
            )
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen at {where[0]}:{where[1]}: {error.strerror}; the coordinator must be an "
                "address of this host and a free port"
            ) from None
        while len(present) < count and not problem and time.monotonic() < deadline:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            open_until_the_end.enter_context(connection)
            told = _receive(connection, SLACK)
            if told is None:
                continue  # a stranger
            waiting.append(connection)
            problem = _clash(told, present, count)
            present[told["index"]] = told["host"]
        missing = [number for number in range(count) if number not in present]
        late = bool(missing) and not problem
        if late:
            there = ", ".join(f"{number} on {host}" for number, host in sorted(present.items()))
            problem = (
                f"process {', '.join(map(str, missing))} of {count} did not come within {seconds:g} s "
                f"(there: {there}); start it, or look at its log"
            )
        answer = {
            "problem": problem,
            "late": late,
            "hosts": [present.get(n, "") for n in range(count)],
        }
        for connection in waiting:
            with contextlib.suppress(OSError):
                _send(connection, answer)
        for connection in waiting:  # the other side closes first, so that the port is free at once
            with contextlib.suppress(OSError):
                connection.settimeout(1)
                connection.recv(1)
    return answer


def _clash(told: dict[str, Any], present: dict[int, str], count: int) -> str:
    number, host = told["index"], told["host"]
    if told["processes"] != count:
        return (
            f"process {number} on {host} was told of {told['processes']} processes, process 0 of {count}; "
            "start all of them with the same number"
        )
    if number in present:
        return f"process {number} was started twice, on {present[number]} and on {host}"
    return ""


def _report(where: tuple[str, int], me: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Any other process: says that it is there, and waits for the answer."""
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(where, timeout=min(left, SLACK)) as connection:
                _send(connection, me)
                answer = _receive(connection, left + SLACK)
                if answer is not None:
                    return answer
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UnavailableError(
        f"process 0 did not answer at {where[0]}:{where[1]} within {seconds:g} s ({reason}); start it, or let "
        "this port through between the hosts"
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line; None when what comes is not one of ours."""
    connection.settimeout(seconds)
    received = b""
    try:
        while not received.endswith(b"\n"):
            part = connection.recv(LINE)
            if not part:
                return None
            received += part
            if len(received) > 1 << 20:
                return None
        told = json.loads(received)
    except (OSError, ValueError):
        return None
    ours = isinstance(told, dict) and (
        "problem" in told or {"index", "host", "processes"} <= told.keys()
    )
    return told if ours else None
