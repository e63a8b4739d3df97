"""A function over chunks, in worker processes, with the results in the order of the chunks."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from llm_jax.data.workers import die_with_parent
from llm_jax.errors import DataError

C = TypeVar("C")
R = TypeVar("R")


def ordered_map(
    make: Callable[..., Callable[[C], R]], settings: tuple, chunks: Iterable[C], workers: int
) -> Iterator[R]:
    """Yields `make(*settings)(chunk)` for every chunk, in order, whatever `workers` is.

    Args:
      make: builds the function once in every process; a module's own function, so it can be sent.
      settings: its arguments.
      chunks: read as they are needed, at most two per worker ahead.
      workers: processes; 0 works in this one.

    Raises:
      DataError: a worker died.
    """
    with ordered_pool(make, settings, workers) as apply:
        yield from apply(chunks)


@contextmanager
def ordered_pool(
    make: Callable[..., Callable[[Any], Any]], settings: tuple, workers: int
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Yields the function chunks -> results of `ordered_map`, to be used more than once."""
    if not workers:
        function = make(*settings)
        yield lambda chunks: map(function, chunks)
        return
    # spawn: a forked child inherits locks held by other threads of the parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (make, settings)) as pool:

        def apply(chunks: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Future[Any]] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # bounds memory when reading outruns the workers
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield apply
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most often for lack of memory; try workers={workers // 2} "
                f"instead of {workers}"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_function: list[Callable[[Any], Any]] = []


def _start(make: Callable[..., Callable[[Any], Any]], settings: tuple) -> None:
    die_with_parent()
    _function.append(make(*settings))


def _work(chunk: Any) -> Any:
    return _function[0](chunk)
