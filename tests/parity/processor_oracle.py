"""transformers' own processors, run in a process of their own: `python processor_oracle.py <folders> <result.pickle>`.

The image processor that AutoProcessor prefers and all video processors need torchvision. Where it is not installed, a
stand-in supplies the functions they call, as calls of the torch operators that torchvision itself calls. (A process of
its own, because transformers decides once, at import, whether torchvision is there.)
"""

import enum
import importlib.machinery
import importlib.util
import pathlib
import pickle
import sys
import types


def stand_in() -> None:
    import torch

    class InterpolationMode(enum.Enum):
        NEAREST, NEAREST_EXACT, BILINEAR = "nearest", "nearest-exact", "bilinear"
        BICUBIC, BOX, HAMMING, LANCZOS = "bicubic", "box", "hamming", "lanczos"

    def resize(image, size, interpolation, antialias=True):
        assert interpolation is InterpolationMode.BICUBIC and image.dtype == torch.uint8
        flat = image.reshape(-1, *image.shape[-3:])
        if tuple(size) != tuple(flat.shape[-2:]):
            flat = torch.nn.functional.interpolate(
                flat, size=list(size), mode="bicubic", align_corners=False, antialias=antialias
            )
        return flat.reshape(*image.shape[:-2], *size)

    def normalize(image, mean, std, inplace=False):
        mean, std = (torch.as_tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
        return image.sub(mean).div_(std)

    def grayscale_to_rgb(image):
        assert image.shape[-3] >= 3
        return image

    def module(name, **members):
        m = types.ModuleType(name)
        m.__spec__, m.__version__ = importlib.machinery.ModuleSpec(name, None), "0.28.0"
        m.__path__, m.__file__ = [], __file__
        m.__dict__.update(members)
        sys.modules[name] = m
        return m

    functional = dict(resize=resize, normalize=normalize, grayscale_to_rgb=grayscale_to_rgb, pil_to_tensor=None)
    functional = {**functional, "InterpolationMode": InterpolationMode}
    root = module("torchvision", io=module("torchvision.io"))
    root.transforms = module("torchvision.transforms", InterpolationMode=InterpolationMode)
    root.transforms.functional = module("torchvision.transforms.functional", **functional)
    root.transforms.v2 = module("torchvision.transforms.v2")
    root.transforms.v2.functional = module("torchvision.transforms.v2.functional", **functional)


if importlib.util.find_spec("torchvision") is None:
    stand_in()

import numpy as np  # noqa: E402
import processor_cases as cases  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.cosmos3_edge import modeling_cosmos3_edge  # noqa: E402
from transformers.models.cosmos3_edge import video_processing_cosmos3_edge as edge_video  # noqa: E402
from transformers.models.qwen2_vl import image_processing_qwen2_vl as qwen_image  # noqa: E402
from transformers.models.qwen3_vl import modeling_qwen3_vl  # noqa: E402
from transformers.models.qwen3_vl import video_processing_qwen3_vl as qwen_video  # noqa: E402


def processor(folder: pathlib.Path):
    """As AutoProcessor puts it together for these model types."""
    edge = folder.name.startswith("edge")
    kinds = (
        (
            transformers.Cosmos3EdgeImageProcessor,
            transformers.Cosmos3EdgeVideoProcessor,
            transformers.Cosmos3EdgeProcessor,
        )
        if edge
        else (transformers.Qwen2VLImageProcessor, transformers.Qwen3VLVideoProcessor, transformers.Qwen3VLProcessor)
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    image, video = (k.from_pretrained(folder) for k in kinds[:2])
    return kinds[2](image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=template)


def metadata(clip) -> dict:
    if clip.indices is None:
        return dict(total_num_frames=len(clip.frames), fps=clip.fps)
    return dict(total_num_frames=clip.indices[-1] + 1, fps=clip.fps, frames_indices=list(clip.indices))


def see(p) -> dict:
    """Every image and every clip by itself."""
    out = {}
    for name, x in cases.images().items():
        y = p.image_processor(x, return_tensors="np")
        out["image", name] = (y["pixel_values"], tuple(y["image_grid_thw"][0].tolist()))
    for name, c in cases.clips().items():
        y = p.video_processor(
            c.frames, video_metadata=[metadata(c)], do_sample_frames=c.indices is None, return_metadata=True,
            return_tensors="np",
        )  # fmt: skip
        grid, m = y["video_grid_thw"][0].tolist(), y["video_metadata"][0]
        indices = np.asarray(m.frames_indices)
        times = p._calculate_timestamps(indices.tolist(), m.fps, p.video_processor.temporal_patch_size)
        out["video", name] = (y["pixel_values_videos"], tuple(grid), indices, times)
    return out


def talk(p, messages, **options) -> dict:
    clips = [cases.clips()[n] for n in cases.names(messages, "video")]
    if clips:
        options["processor_kwargs"] = {"video_metadata": [metadata(c) for c in clips]}
    full = cases.with_media(messages, lambda kind, x: x.frames if kind == "video" else x)
    y = p.apply_chat_template(full, tokenize=True, return_dict=True, return_tensors="pt", **options)
    model = modeling_cosmos3_edge.Cosmos3EdgeModel if "Edge" in type(p).__name__ else modeling_qwen3_vl.Qwen3VLModel
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2))
    self = types.SimpleNamespace(
        config=config, get_vision_position_ids=types.MethodType(model.get_vision_position_ids, model)
    )
    grids = {k: y.get(k) for k in ("image_grid_thw", "video_grid_thw")}
    kinds = y.get("mm_token_type_ids")
    if kinds is None:  # Edge's processor gives none unless asked
        kinds = torch.tensor(p.create_mm_token_type_ids(y["input_ids"].tolist()))
    where, _ = model.get_rope_index(self, y["input_ids"], kinds, **grids)
    return dict(ids=y["input_ids"][0].numpy(), kinds=kinds[0].numpy(), positions=where[:, 0].numpy())


def sizes() -> dict:
    """The wanted sizes of many pictures, limits included; None where the reference refuses."""
    out = {}

    def note(key, f, *args, **options):
        try:
            out[key] = tuple(f(*args, **options))
        except (ValueError, ZeroDivisionError):
            out[key] = None

    sides = (1, 5, 31, 32, 47, 48, 49, 80, 333, 1080, 4097, 9001)
    for limit in ((65536, 16777216), (4096, 200000)):
        for h in sides:
            for w in sides:
                pixels = dict(min_pixels=limit[0], max_pixels=limit[1])
                note(("image", limit, h, w), qwen_image.smart_resize, h, w, factor=32, **pixels)
                for t in (1, 2, 3, 5, 40):
                    for name, f, group in (("qwen", qwen_video, 2), ("edge", edge_video, 1)):
                        key = (name, limit, h, w, t)
                        note(key, f.smart_resize, t, h, w, temporal_factor=group, factor=32, **pixels)
    return out


def defaults() -> dict:
    """What the classes do when a file leaves everything out."""
    fields = ("size", "patch_size", "temporal_patch_size", "image_mean", "image_std", "rescale_factor", "fps",
              "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens")  # fmt: skip
    kinds = (transformers.Qwen2VLImageProcessor, transformers.Qwen3VLVideoProcessor,
             transformers.Cosmos3EdgeImageProcessor, transformers.Cosmos3EdgeVideoProcessor)  # fmt: skip
    return {k.__name__: {f: _plain(getattr(k(), f, None)) for f in fields} for k in kinds}


def _plain(x):
    return (x.shortest_edge, x.longest_edge) if hasattr(x, "shortest_edge") else x


def main(root: pathlib.Path) -> dict:
    result = {"sizes": sizes(), "defaults": defaults(), "torchvision": sys.modules["torchvision"].__file__ != __file__}
    for folder in sorted(root.iterdir()):
        p = processor(folder)
        chats = {}
        if folder.name in ("qwen", "edge"):
            for name, messages in cases.conversations().items():
                prompt = messages[-1]["role"] == "user"
                chats[name] = talk(p, messages, add_generation_prompt=prompt)
            attack = [{"role": "user", "content": cases.ATTACK}]
            chats["attack"] = talk(p, attack, add_generation_prompt=True, sanitize_control_tokens=True)
        result[folder.name] = {"seen": see(p), "chats": chats}
    return result


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_bytes(pickle.dumps(main(pathlib.Path(sys.argv[1]))))
