"""Many prompts through transformers' continuous batching: the next one takes the place of one that is done.

Without flash attention the library (5.23) computes each pass over one mask of all tokens that all requests hold, so that its
cost grows with the square of the batch; benchmarks/batch_inference.py shows where that pays.
"""

import copy
import math
from collections.abc import Iterator, Sequence

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..errors import InputError
from ..inference.generation import Sampling
from .generate_many import Completion, Request, finish


_PAGE = 256  # tokens; what flash attention's kernels want
_PASS = 512  # tokens at once; longer prompts are read in several passes


def generate_continuously(
    model: PreTrainedModel,
    requests: Sequence[Request],
    batch_size: int,
    sampling: Sampling,
    stop_tokens: list[int],
) -> Iterator[Completion]:
    """Continues prompts, and yields each when it is done; arguments as of [`generate_many`].

    Raises:
        InputError: if the model's generation settings name a logits processor that the library would drop.
        RuntimeError: if the library's thread fails.
    """
    if not requests:
        return
    config = copy.deepcopy(model.generation_config)
    config.update(**sampling.arguments(), eos_token_id=stop_tokens or -1)
    _check_processors(model, config)
    manager = model.init_continuous_batching(config, bounded(requests, batch_size))
    manager.start()
    try:
        yield from _results(manager, requests, stop_tokens)
    finally:
        # Not by the library's context manager, which after Ctrl-C finishes all requests first.
        manager.stop(hard_stop=True)
        manager.destroy()


def bounded(requests: Sequence[Request], batch_size: int) -> ContinuousBatchingConfig:
    """The library's settings for a cache that holds the longest request `batch_size` times, and nothing more.

    Left to itself it takes 60 % of the memory of the machine, or 90 % of a GPU's.
    """
    longest = max(len(request.ids) + request.max_new_tokens for request in requests)
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=batch_size * math.ceil(longest / _PAGE),
        max_batch_tokens=max(batch_size, _PASS),
        max_requests_per_batch=batch_size,
        allow_block_sharing=False,  # blocks kept for prompts that begin alike would not be free
        safety_margin=0.0,  # there is room for every request that is let in
    )


def _check_processors(model: PreTrainedModel, config: GenerationConfig) -> None:
    for processor in model._get_logits_processor(config):
        if not getattr(processor, "supports_continuous_batching", False):
            raise InputError(
                f"--engine continuous: the model's generation_config.json asks for a {type(processor).__name__}, which "
                "continuous batching does not apply; take --engine batch"
            )


def _results(
    manager: ContinuousBatchingManager, requests: Sequence[Request], stop_tokens: list[int]
) -> Iterator[Completion]:
    waiting = {str(request.key): request for request in requests}
    for name, request in sorted(waiting.items(), key=lambda item: len(item[1].ids), reverse=True):
        manager.add_request(
            list(request.ids), name, max_new_tokens=request.max_new_tokens, eos_token_id=stop_tokens or None
        )
    while waiting:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(
                    f"continuous batching ended before its requests: {manager.background_thread_status.fatal_error}"
                )
        elif result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        elif result.is_finished():
            yield finish(waiting.pop(result.request_id), result.generated_tokens, stop_tokens)
