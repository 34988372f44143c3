"""A vLLM engine that is a replica of a fleet, and says what it serves.

Run as `python -m support.engine_replica ADDRESS CHECKPOINTS COUNT INIT_INFO` by `support.engine_company`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Client

from support.checkpoints import Checkpoints
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_engine.answers import asked
from vllm_engine.models import NEW_TOKENS

import weft_vllm


def main(arguments: Sequence[str]) -> None:
    """Say `joining`, `joined`, `serves` and `failed` as `support.fleet.serve` does, until the engine is dead."""
    address, folder, count, init_info = arguments
    pipe, checkpoints = Client(address, "AF_UNIX"), Checkpoints(folder, int(count))
    llm = LLM(
        str(checkpoints.path(0)), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128,
        block_size=32, enable_prefix_caching=True, weight_transfer_config={"backend": "weft"},
    )  # fmt: skip
    control = weft_vllm.control(llm)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)

    def wrong(version: int) -> list[str]:
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in asked()], sampling, use_tqdm=False)
        differing = control.verify(str(checkpoints.path(version))).failures()
        return [*checkpoints.wrong(version, [list(answer.outputs[0].token_ids) for answer in answers]), *differing]

    def served() -> tuple[list[str], int | None, str]:
        """What is wrong with what is served after a failure, which version that is, and why it is none."""
        try:
            return wrong(version), version, ""
        except (weft_vllm.RefusedError, EngineDeadError) as error:
            return [], None, f"{type(error).__name__}: {error}"

    version, alive = 0, True
    while alive:
        pipe.send(("joining",))
        try:
            llm.init_weight_transfer_engine({"init_info": json.loads(init_info)})
            pipe.send(("joined",))
            while True:
                version = control.refit().version
                pipe.send(("serves", version, wrong(version), time.monotonic()))
        except Exception as error:  # noqa: BLE001  # who hears it judges it
            pipe.send(("failed", type(error).__name__, str(error), *served()))
            alive = not isinstance(error, EngineDeadError)


if __name__ == "__main__":
    main(sys.argv[1:])
