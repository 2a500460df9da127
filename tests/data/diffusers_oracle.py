"""diffusers' own Cosmos 3 pipeline without networks: it tokenises prompts and prepares pictures as released."""

import types

import torch
from diffusers import Cosmos3OmniPipeline
from diffusers.modular_pipelines.cosmos import encoders
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from data_pipelines.prompts import Prompts
from data_pipelines.tokenizer import ChatTokenizer

TOKENIZER = ChatTokenizer()


class Tokenizer:
    """The toy's tokenizer behind transformers' interface."""

    eos_token_id = TOKENIZER.eos

    def convert_tokens_to_ids(self, token):
        return {"<|vision_start|>": TOKENIZER.vision_start}[token]

    def apply_chat_template(self, messages, **_):
        return types.SimpleNamespace(input_ids=TOKENIZER.chat([(m["role"], m["content"]) for m in messages]))


class VAE:
    dtype = torch.float32
    config = types.SimpleNamespace(
        latents_mean=[0.0], latents_std=[1.0], scale_factor_spatial=16, scale_factor_temporal=4
    )


def pipeline(default_use_system_prompt=True) -> Cosmos3OmniPipeline:
    return Cosmos3OmniPipeline(
        transformer=None,
        text_tokenizer=Tokenizer(),
        vae=VAE(),
        scheduler=None,
        enable_safety_checker=False,
        default_use_system_prompt=default_use_system_prompt,
    )


def modular(block: str, **inputs) -> tuple[list[int], list[int]]:
    """Conditional and unconditional ids of a modular text step."""
    pipe = pipeline()
    components = types.SimpleNamespace(
        requires_safety_checker=False,
        text_tokenizer=pipe.text_tokenizer,
        llm_special_tokens=pipe.llm_special_tokens,
        config=pipe.config,
        tokenize_prompt=pipe.tokenize_prompt,
    )
    state = PipelineState()
    for name, value in inputs.items():
        state.set(name, value)
    getattr(encoders, block)()(components, state)
    return state.get("cond_input_ids"), state.get("uncond_input_ids")


def ids(prompts: Prompts) -> tuple[list[int], list[int]]:
    """The same of our texts."""
    return tuple(TOKENIZER.generation_ids(text, prompts.system) for text in (prompts.positive, prompts.negative))
