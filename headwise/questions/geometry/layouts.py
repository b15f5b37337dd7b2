"""How projections of several roles at once are laid out, and how a layer's projections are cut into heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.errors import HeadwiseError

STACKED = {
    "qkv": {
        "blip", "blip_2", "cohere_compass", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl_hybrid",
        "dots3_note", "edgetam_video", "ernie4_5_vl_moe", "exaone4_5", "glm4v", "glm4v_moe",
        "glm5_next", "glm_image", "glm_ocr", "got_ocr2", "hiera", "instructblip", "instructblipvideo",
        "mgp_str", "paddleocr_vl", "pp_formulanet", "pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec",
        "pp_ocrv6_small_rec", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
        "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "sam", "sam2", "sam2_video",
        "sam_hq", "seggpt", "slanext", "timesformer", "unlimited_ocr", "vitdet",
    },
    "qkv_proj": {"phi3", "phi4_multimodal"},
    "Wqkv": {"modernbert", "modernvbert", "mpt", "dbrx"},
    "c_attn": {"gpt2", "openai", "openai_gpt", "imagegpt", "decision_transformer", "gpt_bigcode"},
    "att_proj": {"bark"},
}  # fmt: skip
"""Projection to the families of transformers that keep all queries, all keys, all values in it."""
BY_HEAD = {
    "query_key_value": {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "fuyu"},
    "in_proj": {"deberta"},
}
"""Projection to the families that keep q, k, v of each head (or the queries of each group, then its key and
value) in turn."""


def layout_of(projection: str, family: str | None, config: dict[str, Any]) -> str | None:
    """`stacked`, `by_head` or `codegen`; None where it is not known."""
    if projection == "in_proj_weight":  # torch's nn.MultiheadAttention
        return "stacked"
    if family == "codegen" and projection == "qkv_proj":
        return None if config.get("n_head", 4) % 4 else "codegen"
    if family == "chatglm" and projection == "query_key_value" and "multi_query_attention" in config:
        return "stacked" if config["multi_query_attention"] else "by_head"
    if family == "falcon" and config.get("multi_query", True) and not config.get("new_decoder_architecture"):
        return "stacked" if projection == "query_key_value" else None
    if family == "gpt_bigcode" and not config.get("multi_query", True):
        return "by_head" if projection == "c_attn" else None
    if family in STACKED.get(projection, ()):
        return "stacked"
    return "by_head" if family in BY_HEAD.get(projection, ()) else None


def split(weight: Tensor, heads: int, width: int, layout: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection `((H + 2K)·D, d_model)` to q `(H·D, d_model)`, k and v `(K·D, d_model)`.

    Raises:
        HeadwiseError: it does not divide into these heads.
    """
    rows = weight.shape[0] - heads * width
    if rows <= 0 or rows % (2 * width) or heads % (rows // (2 * width)):
        raise HeadwiseError(
            f"{where}: a fused projection of {weight.shape[0]} rows does not divide into {heads} query "
            f"heads of {width} and their keys and values"
        )
    kv_heads = rows // (2 * width)
    if layout == "stacked":
        q, k, v = weight.split((heads * width, kv_heads * width, kv_heads * width))
        return q, k, v
    if layout == "codegen":  # four blocks, each of queries, values, keys
        q, v, k = weight.reshape(4, 3, -1, weight.shape[-1]).unbind(1)
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    groups = weight.reshape(kv_heads, heads // kv_heads + 2, width, -1)
    q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)
