"""Workers in separate processes that need not import torch and transformers again, for many short measurements.

Every worker is a new fork of a server that has imported the libraries and computed nothing. Its peak memory is its own
plus that of the imports, as in any other process.
"""

import json
import multiprocessing
from collections.abc import Callable
from typing import Any

PRELOADED = ["torch", "transformers", "transformers.models.olmoe.modeling_olmoe", "peft", "hfedmoe.moe.model"]


def in_forked_process(work: Callable[..., dict[str, Any]], *arguments: Any, timeout_s: float) -> dict[str, Any] | None:
    """`work(*arguments)` in a separate process; None if it was killed (too little memory) or took too long.

    Args:
        work: a function of a module, with arguments and a result that JSON can hold.

    Raises:
        RuntimeError: `work` raised an error; the message contains that error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, work, arguments), daemon=True)
    process.start()
    sending.close()
    answer = None
    try:
        if receiving.poll(timeout_s):
            answer = json.loads(receiving.recv_bytes())
    except EOFError:  # it died without an answer
        answer = None
    if answer is None:
        process.kill()
    process.join()
    if answer is not None and "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _answer(sending: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        answer = work(*arguments)
    except Exception as error:  # reported by the parent
        answer = {"error": f"{work.__module__}.{work.__name__}{arguments}: {type(error).__name__}: {error}"}
    sending.send_bytes(json.dumps(answer).encode())
