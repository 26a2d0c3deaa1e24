"""Which cell and which part each parameter of other people's models is in. The oracle is their modules, listed by hand
from their `forward` in transformers: what a layer does before and after its first residual connection."""

import functools

import pytest
import torch
import transformers
from test_slowfast import stand_in

import slowfast
from slowfast import Convention, Place, SlowFast, param_groups, places

# --- the families -----------------------------------------------------------------------------------------------

# name -> (class, its layers, in a layer: the attention's and the feed-forward's, outside: the embeddings', the head's).
# A class with a dot is a part of a model. All have 12 layers.
LLAMA_NORM, GEMMA_NORMS = "post_attention_layernorm", "pre_feedforward_layernorm post_feedforward_layernorm"
BERTS = ("encoder.layer", "attention", "intermediate output")
LLAMAS = ("layers", "self_attn input_layernorm", f"mlp {LLAMA_NORM}", "embed_tokens", "norm")
BARTS = ("layers", "self_attn self_attn_layer_norm", "fc1 fc2 final_layer_norm")
CLIPS = ("encoder.layers", "self_attn layer_norm1", "mlp layer_norm2")
VITS = ("layers", "attention layernorm_before", "mlp layernorm_after", "embeddings")
DINOS = ("encoder.layer", "norm1 attention layer_scale1", "norm2 mlp layer_scale2", "embeddings", "layernorm")
SPEECH = (
    "encoder.layers", "attention layer_norm", "feed_forward final_layer_norm",
    "masked_spec_embed feature_extractor feature_projection encoder.pos_conv_embed",
)  # fmt: skip
T5S = ("encoder.block", "layer.0", "layer.1", "shared")
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
FAMILIES = {
    # encoder.layer.N
    "BERT": ("BertModel", *BERTS, "embeddings", "pooler"),
    "XLM-R": ("XLMRobertaForSequenceClassification", "roberta.encoder.layer", *BERTS[1:], "roberta.embeddings",
              "classifier"),
    "XLM-R XL": ("XLMRobertaXLModel", "encoder.layer", "attention", "intermediate output LayerNorm", "embeddings",
                 "encoder.LayerNorm pooler"),
    "RoBERTa, norms first": ("RobertaPreLayerNormModel", *BERTS, "embeddings", "LayerNorm pooler"),
    "ELECTRA": ("ElectraForPreTraining", "electra.encoder.layer", *BERTS[1:],
                "electra.embeddings electra.embeddings_project", "discriminator_predictions"),
    "RemBERT": ("RemBertModel", *BERTS, "embeddings encoder.embedding_hidden_mapping_in", "pooler"),
    "DeBERTa": ("DebertaModel", *BERTS, "embeddings", ""),
    "mDeBERTa": ("DebertaV2ForMaskedLM", "deberta.encoder.layer", *BERTS[1:],
                 "deberta.embeddings deberta.encoder.rel_embeddings deberta.encoder.LayerNorm", "cls"),
    "DeBERTa-v2 with its convolution": ("DebertaV2Model", *BERTS,
                                        "embeddings encoder.rel_embeddings encoder.LayerNorm encoder.conv", ""),
    "MPNet": ("MPNetModel", *BERTS, "embeddings encoder.relative_attention_bias", "pooler"),
    "ESM": ("EsmForMaskedLM", "esm.encoder.layer", "attention", "intermediate output LayerNorm", "esm.embeddings",
            "esm.encoder.emb_layer_norm_after esm.contact_head lm_head"),
    "LayoutLM": ("LayoutLMModel", *BERTS, "embeddings", "pooler"),
    "LayoutLMv3": ("LayoutLMv3Model", *BERTS, "embeddings cls_token pos_embed patch_embed LayerNorm norm "
                   "encoder.rel_pos_bias encoder.rel_pos_x_bias encoder.rel_pos_y_bias", ""),
    "ConvBERT": ("ConvBertModel", *BERTS, "embeddings", ""),
    "Longformer": ("LongformerModel", *BERTS, "embeddings", "pooler"),
    "BigBird": ("BigBirdModel", *BERTS, "embeddings", "pooler"),
    "RoFormer": ("RoFormerModel", *BERTS, "embeddings encoder.embed_positions", ""),
    "Megatron-BERT": ("MegatronBertModel", "encoder.layer", "attention", "ln intermediate output", "embeddings",
                      "encoder.ln pooler"),
    "DINOv2": ("Dinov2Model", *DINOS),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", *DINOS),
    "ViLT": ("ViltModel", "encoder.layer", "layernorm_before attention", "layernorm_after intermediate output",
             "embeddings", "layernorm pooler"),
    "Data2Vec vision": ("Data2VecVisionModel", "encoder.layer", "layernorm_before attention lambda_1",
                        "layernorm_after intermediate output lambda_2", "embeddings", ""),
    "CANINE's deep part": ("CanineModel.encoder", "layer", *BERTS[1:], "", ""),
    # (transformer.)layer.N
    "DistilBERT": ("DistilBertForMaskedLM", "distilbert.transformer.layer", "attention sa_layer_norm",
                   "ffn output_layer_norm", "distilbert.embeddings",
                   "vocab_transform vocab_layer_norm vocab_projector"),
    "XLNet": ("XLNetForSequenceClassification", "transformer.layer", "rel_attn", "ff",
              "transformer.mask_emb transformer.word_embedding", "sequence_summary logits_proj"),
    # encoder.block.N
    "T5": ("T5EncoderModel", *T5S[:3], f"shared {BIAS}", "encoder.final_layer_norm"),
    "mT5": ("MT5EncoderModel", *T5S[:3], f"shared {BIAS}", "encoder.final_layer_norm"),
    "UMT5": ("UMT5EncoderModel", *T5S, "encoder.final_layer_norm"),
    "T5's encoder by itself": ("T5Model.encoder", "block", *T5S[1:3], f"embed_tokens {BIAS[8:]}", "final_layer_norm"),
    # h.N, blocks.N
    "GPT-2": ("GPT2LMHeadModel", "transformer.h", "ln_1 attn", "ln_2 mlp", "transformer.wte transformer.wpe",
              "transformer.ln_f"),
    "GPT": ("OpenAIGPTModel", "h", "attn ln_1", "mlp ln_2", "tokens_embed positions_embed", ""),
    "GPT-J": ("GPTJModel", "h", "ln_1 attn", "mlp", "wte", "ln_f"),
    "CodeGen": ("CodeGenModel", "h", "ln_1 attn", "mlp", "wte", "ln_f"),
    "BLOOM": ("BloomModel", "h", "input_layernorm self_attention", f"mlp {LLAMA_NORM}",
              "word_embeddings word_embeddings_layernorm", "ln_f"),
    "Falcon": ("FalconModel", "h", "input_layernorm self_attention", "mlp", "word_embeddings", "ln_f"),
    "MPT": ("MptModel", "blocks", "norm_1 attn", "norm_2 ffn", "wte", "norm_f"),
    # layers.N
    "Llama": ("LlamaForSequenceClassification", "model.layers", *LLAMAS[1:3], "model.embed_tokens", "model.norm score"),
    "Mistral": ("MistralModel", *LLAMAS),
    "Mixtral": ("MixtralModel", *LLAMAS),
    "Qwen 2": ("Qwen2Model", *LLAMAS),
    "Qwen 3": ("Qwen3Model", *LLAMAS),
    "Qwen MoE": ("Qwen2MoeModel", *LLAMAS),
    "Gemma": ("GemmaModel", *LLAMAS),
    "Gemma 2": ("Gemma2Model", "layers", f"self_attn input_layernorm {LLAMA_NORM}", f"mlp {GEMMA_NORMS}", *LLAMAS[3:]),
    "Gemma 3": ("Gemma3TextModel", "layers", f"self_attn input_layernorm {LLAMA_NORM}", f"mlp {GEMMA_NORMS}",
                *LLAMAS[3:]),
    "OLMo 2": ("Olmo2Model", "layers", f"self_attn {LLAMA_NORM}", "mlp post_feedforward_layernorm", *LLAMAS[3:]),
    "GLM-4": ("Glm4Model", "layers", "input_layernorm self_attn post_self_attn_layernorm",
              f"{LLAMA_NORM} mlp post_mlp_layernorm", *LLAMAS[3:]),
    "Cohere": ("CohereModel", "layers", "self_attn input_layernorm", "mlp", *LLAMAS[3:]),
    "StarCoder 2": ("Starcoder2Model", *LLAMAS),
    "Phi": ("PhiModel", "layers", "self_attn input_layernorm", "mlp", "embed_tokens", "final_layernorm"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "gpt_neox.layers", "input_layernorm attention", f"mlp {LLAMA_NORM}",
                 "gpt_neox.embed_in", "gpt_neox.final_layer_norm lm_head"),
    "GPT-NeoX Japanese": ("GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese.layers", "input_layernorm attention",
                          f"mlp {LLAMA_NORM}", "gpt_neox_japanese.embed_in",
                          "gpt_neox_japanese.final_layer_norm embed_out"),
    "EuroBERT": ("EuroBertModel", *LLAMAS),
    "ModernBERT": ("ModernBertForSequenceClassification", "model.layers", "attn_norm attn", "mlp_norm mlp",
                   "model.embeddings", "model.final_norm head classifier"),
    "Nomic": ("NomicBertModel", "layers", f"self_attn {LLAMA_NORM}", "mlp post_mlp_layernorm", "embeddings", ""),
    "SqueezeBERT": ("SqueezeBertModel", "encoder.layers", "attention post_attention", "intermediate output",
                    "embeddings", "pooler"),
    "Reformer": ("ReformerModel", "encoder.layers", "attention", "feed_forward", "embeddings", "encoder.layer_norm"),
    "OPT": ("OPTModel", "decoder.layers", *BARTS[1:], "decoder.embed_tokens decoder.embed_positions",
            "decoder.final_layer_norm"),
    "XGLM": ("XGLMModel", *BARTS, "embed_tokens", "layer_norm"),
    "BART's encoder": ("BartModel.encoder", *BARTS, "embed_tokens embed_positions layernorm_embedding", ""),
    "mBART's encoder": ("MBartModel.encoder", *BARTS, "embed_tokens embed_positions layernorm_embedding", "layer_norm"),
    "M2M100's encoder": ("M2M100Model.encoder", *BARTS, "embed_tokens", "layer_norm"),
    "Whisper's encoder": ("WhisperModel.encoder", *BARTS, "conv1 conv2 embed_positions", "layer_norm"),
    "CLIP text": ("CLIPTextModel", *CLIPS, "embeddings", "final_layer_norm"),
    "CLIP vision": ("CLIPVisionModel", *CLIPS, "embeddings pre_layrnorm", "post_layernorm"),
    "SigLIP vision": ("SiglipVisionModel", *CLIPS, "embeddings", "post_layernorm head"),
    "ViT": ("ViTModel", *VITS, "layernorm pooler"),
    "DeiT": ("DeiTModel", *VITS, "layernorm pooler"),
    "AST": ("ASTModel", *VITS, "layernorm"),
    "BEiT": ("BeitModel", "layers", f"{VITS[1]} lambda_1", f"{VITS[2]} lambda_2", "embeddings", "pooler"),
    "Wav2Vec2": ("Wav2Vec2ForCTC", "wav2vec2.encoder.layers", *SPEECH[1:3],
                 " ".join(f"wav2vec2.{name}" for name in SPEECH[3].split()), "wav2vec2.encoder.layer_norm lm_head"),
    "HuBERT": ("HubertModel", *SPEECH, "encoder.layer_norm"),
    "Data2Vec audio": ("Data2VecAudioModel", *SPEECH, "encoder.layer_norm"),
    "WavLM": ("WavLMModel", *SPEECH[:3], f"{SPEECH[3]} encoder.layers.0.attention.rel_attn_embed",
              "encoder.layer_norm"),
}  # fmt: skip
DEPTH = {"MBartModel": "encoder_layers", "BartModel": "encoder_layers", "WhisperModel": "encoder_layers"}
DEPTH |= {"M2M100Model": "encoder_layers"}
CONFIGS = {
    "EsmForMaskedLM": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Wav2Vec2ForCTC": {"vocab_size": 32},
    "BeitModel": {"layer_scale_init_value": 0.1},
    "ReformerModel": {"attn_layers": ["local", "lsh"] * 6},
    "mDeBERTa": {"relative_attention": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
}
CONFIGS["DeBERTa-v2 with its convolution"] = {**CONFIGS["mDeBERTa"], "conv_kernel_size": 3, "conv_act": "gelu"}


def build(name, **options):
    """A class of transformers, or with a dot a module of one, without its weights' memory."""
    cls, _, module = name.partition(".")
    cls = getattr(transformers, cls, None) or pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        model = cls(cls.config_class(**options))
    return model.get_submodule(module)


def family(name):
    cls, *listed = FAMILIES[name]
    bare = cls.partition(".")[0]
    model = build(cls, **{DEPTH.get(bare, "num_hidden_layers"): 12}, **CONFIGS.get(name, CONFIGS.get(bare, {})))
    return model, listed


def ids(module, paths):
    """The ids of the parameters of these modules, or parameters, of a module; a path that is not there has none."""
    found = set()
    for path in paths.split():
        part = functools.reduce(lambda at, key: getattr(at, key, None), path.split("."), module)
        found |= (
            {id(part)}
            if isinstance(part, torch.nn.Parameter)
            else {id(p) for p in part.parameters()}
            if part
            else set()
        )
    return found


def by_hand(model, layers, attention, feed_forward, embeddings, head):
    """{id of a parameter: Place}; each parameter of the model has just one."""
    at = {}
    for i, layer in enumerate(model.get_submodule(layers)):
        for block, paths in (("attention", attention), ("feed-forward", feed_forward)):
            of_block = ids(layer, paths)
            assert of_block and not of_block & at.keys()
            at.update(dict.fromkeys(of_block, Place("layer", i, block)))
    assert not at.keys() & ids(model, head)
    at.update(dict.fromkeys(ids(model, head), Place("head")))
    at.update(dict.fromkeys(ids(model, embeddings), Place("embeddings")))  # T5's bias too, though it is in a layer
    assert at.keys() == {id(p) for p in model.parameters()}
    return at


def cell_by_hand(place):
    """Of 12 layers (Sections 3.1 and 3.2)."""
    if place.part != "layer":
        return "rest"
    if place.layer < 10:
        return "S_II" if place.layer < 4 and place.block == "feed-forward" else "S_I-S_II"
    return "V_II" if place.block == "attention" else "V_I-V_II"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_part_and_the_cell_of_each_parameter(name):
    model, listed = family(name)
    at = by_hand(model, *listed)
    found, depth = places(model)
    assert depth == 12
    assert found == {name: at[id(p)] for name, p in model.named_parameters()}
    cells = {id(p): group["name"] for group in param_groups(model) for p in group["params"]}
    assert cells == {id(p): cell_by_hand(at[id(p)]) for p in model.parameters() if p.requires_grad}  # no sinusoids


class Block(torch.nn.Module):
    """As in timm's vision transformers, which name the scales of the residual branches ls1 and ls2."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1 = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
        self.norm2, self.mlp, self.ls2 = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)


class TimmLike(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = (torch.nn.Parameter(torch.zeros(1, 4)) for _ in range(2))
        self.patch_embed, self.blocks = torch.nn.Conv2d(3, 4, 2), torch.nn.Sequential(*(Block() for _ in range(12)))
        self.norm, self.head = torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)


def torchs_own():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    return torch.nn.ModuleDict({"body": torch.nn.TransformerEncoder(layer, 12), "head": torch.nn.Linear(8, 2)})


def under_a_telling_name():
    """A prefix that is called so makes no embeddings of what stands under it; embed_out is what GPT-NeoX called its
    head."""
    heads = {name: torch.nn.Linear(4, 4) for name in ("conv", "embed_out")}
    return torch.nn.ModuleDict({"embedder": build("BertModel"), **heads})


OTHERS = {
    "timm": (TimmLike, "blocks", "norm1 attn ls1", "norm2 mlp ls2", "cls_token pos_embed patch_embed", "norm head"),
    "torch's own": (torchs_own, "body.layers", "self_attn norm1", "linear1 linear2 norm2", "", "head"),
    "under a telling name": (under_a_telling_name, "embedder.encoder.layer", *BERTS[1:], "embedder.embeddings",
                             "embedder.pooler conv embed_out"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others(name):
    make, *listed = OTHERS[name]
    model = make()
    at = by_hand(model, *listed)
    assert places(model) == ({name: at[id(p)] for name, p in model.named_parameters()}, 12)


# Of these, some call the feed-forward's norm post_attention_layernorm and some the attention's.
NAMED_ALIKE = ["Llama", "Qwen2", "Bloom", "GPTNeoX", "Glm4", "Gemma2", "Olmo2", "NomicBert"]


@pytest.mark.parametrize("name", NAMED_ALIKE)
def test_what_a_norm_between_the_blocks_serves(name):
    """Without a feed-forward, it still changes what the model says if, and only if, it is of the attention."""
    cls = getattr(transformers, f"{name}Model")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = cls(cls.config_class(vocab_size=20, pad_token_id=0, **sizes)).eval()
    block = {name: place.block for name, place in places(model)[0].items()}
    [norm] = [name for name in block if name.endswith("post_attention_layernorm.weight")]
    said = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mlp." in name:
                p.zero_()
        for more in (0, torch.linspace(1, 3, 16)):
            dict(model.named_parameters())[norm].add_(more)
            said.append(model(input_ids=torch.arange(1, 8)[None]).last_hidden_state)
    assert block[norm] == ("feed-forward" if torch.equal(*said) else "attention")


def test_last_1_freezes_what_the_table_calls_embeddings():
    from paper import starts  # noqa: PLC0415

    model, listed = family("mDeBERTa")
    at = by_hand(model, *listed)
    starts.start("last-1", model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {key for key, place in at.items() if place.part == "head" or place.layer == 11}


# --- refusals ---------------------------------------------------------------------------------------------------


def layer_of(n, *blocks):
    return [f"encoder.layer.{n}.{block}.weight" for block in blocks or ("attention", "output")]


def shared_layers():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2, 16)] * 12)
    return model


def tuned_prefix():
    peft = pytest.importorskip("peft")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


MORE, NEITHER, NO_LIST = "more than one stack", "neither of the attention nor of the feed-forward", "no list of layers"
REFUSED = {  # -> (what to build, what the message says)
    "ALBERT": ("AlbertModel", ["one set of weights serves all layers"]),
    "layers that are one": (shared_layers, ["one set of weights serves layers 0 and 1"]),
    "CANINE": ("CanineModel", [MORE, "initial_char_encoder.layer", "final_char_encoder.layer", "encoder.layer"]),
    "BART": ("BartModel", [MORE, "decoder.layers, encoder.layers", "Give param_groups the module"]),
    "T5": ("T5Model", [MORE, "decoder.block, encoder.block"]),
    "Whisper": ("WhisperModel", [MORE, "decoder.layers, encoder.layers"]),
    "LXMERT": ("LxmertModel", [MORE, "encoder.r_layers, encoder.x_layers"]),
    "CLIP": ("CLIPModel", [MORE, "text_model.encoder.layers, vision_model.encoder.layers"]),
    "Wav2Vec2 with an adapter": (functools.partial(build, "Wav2Vec2Model", add_adapter=True), [MORE, "adapter.layers"]),
    "T5's decoder": ("T5Model.decoder", [NEITHER, "block.0.layer.1.EncDecAttention.q.weight"]),
    "BART's decoder": ("BartModel.decoder", [NEITHER, "layers.0.encoder_attn.k_proj.weight"]),
    "torch's decoder": (
        lambda: torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2, 16), 2), [NEITHER, "multihead_attn"],
    ),
    "Mamba": ("MambaModel", [NEITHER, "layers.0.norm.weight"]),
    "Jamba": ("JambaModel", [NEITHER, "layers.0.mamba."]),
    "FNet": ("FNetModel", [NEITHER, "encoder.layer.0.fourier."]),
    "MobileBERT": ("MobileBertModel", [NEITHER, "encoder.layer.0.bottleneck."]),
    "conformer": ("Wav2Vec2ConformerModel", [NEITHER, "encoder.layers.0.ffn1_layer_norm", "append a row", "places"]),
    "Swin": ("SwinModel", ["encoder.layers.0.blocks.0.", "layers within layers?"]),
    "ResNet": ("ResNetModel", [MORE, "encoder.stages.0.layers, encoder.stages.1.layers"]),
    "XLM": ("XLMModel", [NO_LIST, "attentions.0.q_lin.weight", "append a row", "places"]),
    "Perceiver": ("PerceiverModel", [NO_LIST]),
    "prefix tuning": (tuned_prefix, ["no weight of S_I-S_II, S_II, V_II is trained"]),
    "no attention": (lambda: stand_in(layer_of(0) + layer_of(1, "output")), ["encoder.layer.1 has no attention"]),
    "no feed-forward": (lambda: stand_in(layer_of(0, "attention")), ["encoder.layer.0 has no feed-forward"]),
    "an unknown second stack": (
        lambda: stand_in([*layer_of(0), "head.decks.0.SelfAttention.weight"]), [MORE, "encoder.layer, head.decks"]
    ),
    "flat parameters": (
        lambda: stand_in(["encoder.layer.0._fsdp_wrapped_module._flat_param"]), [NEITHER, "use_orig_params=True"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name):
    make, said = REFUSED[name]
    with pytest.raises(ValueError) as e:
        SlowFast(torch.optim.SGD(param_groups(make() if callable(make) else build(make)), lr=1.0))
    assert all(text in str(e.value) for text in said), e.value


# --- wrappers ---------------------------------------------------------------------------------------------------


GEMMA_TUNED = [LLAMA_NORM, *GEMMA_NORMS.split()]


def tiny(**options):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.XLMRobertaConfig(**sizes, num_hidden_layers=12, max_position_embeddings=10, **options)
    return transformers.XLMRobertaForSequenceClassification(config)


def each_layer(wrap):
    def wrapped(model):
        layers = model.roberta.encoder.layer
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return model

    return wrapped


def checkpointed(layer):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa: PLC0415

    return checkpoint_wrapper(layer)


def under(*names):
    """What other wrappers do to names."""

    def wrap(module):
        for name in names:
            inner, module = module, torch.nn.Module()
            module.add_module(name, inner)
        return module

    return wrap


WRAPPED = {
    "compiled": torch.compile,
    "layers compiled": each_layer(torch.compile),
    "layers checkpointed": each_layer(checkpointed),
    "both": each_layer(lambda layer: torch.compile(checkpointed(layer))),
    "DataParallel": torch.nn.DataParallel,
    "layers in DataParallel": each_layer(torch.nn.DataParallel),
    "base layers": each_layer(under("base_layer")),
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "FSDP": lambda model: under("_fsdp_wrapped_module")(each_layer(under("_fsdp_wrapped_module"))(model)),
    "saved modules": each_layer(under("default", "modules_to_save")),
    "original modules": each_layer(under("original_module")),
}


@pytest.fixture
def alone():
    """A process group of one."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_change_no_place(kind, request):
    if kind == "DistributedDataParallel":
        request.getfixturevalue("alone")
    at, _ = places(tiny())  # of XLM-R: checked above
    model = WRAPPED[kind](tiny())
    found, depth = places(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert list(found.values()) == list(at.values()) and depth == 12


def test_lora():
    """Its matrices go where the weight is that they stand beside; what is frozen leaves the groups."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value", "intermediate.dense"],
        modules_to_save=["output.LayerNorm", "word_embeddings"],
    )  # fmt: skip
    model = peft.get_peft_model(tiny(), config)
    inner = model.base_model.model
    listed = ("roberta.encoder.layer", *BERTS[1:], "roberta.embeddings", "classifier")
    at = by_hand(inner, *listed)
    assert places(model) == ({name: at[id(p)] for name, p in model.named_parameters()}, 12)
    cells = {id(p): group["name"] for group in param_groups(model) for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert cells == {key: cell_by_hand(at[key]) for key in trained}
    assert set(cells.values()) == {"S_I-S_II", "S_II", "V_I-V_II", "V_II", "rest"} and len(trained) < len(at)


def test_tuned_norms():
    """PEFT puts a norm of two meanings a level deeper."""
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    config = transformers.Gemma2Config(vocab_size=20, pad_token_id=0, num_hidden_layers=12, **sizes)
    model = transformers.Gemma2ForCausalLM(config)
    model = peft.get_peft_model(model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=GEMMA_TUNED))
    _, layers, *blocks, _, _ = FAMILIES["Gemma 2"]
    at = by_hand(model.base_model.model, f"model.{layers}", *blocks, "model.embed_tokens", "model.norm lm_head")
    assert places(model) == ({name: at[id(p)] for name, p in model.named_parameters()}, 12)


# --- models that no row knows -----------------------------------------------------------------------------------

MIXERS = [f"net.cells.{n}.{name}.weight" for n in range(12) for name in ("mix", "mix_scale", "think")]
MIXERS = ["net.glyphs.weight", *MIXERS, "verdict.weight"]
MIXED = {
    name: Place("layer", int(name.split(".")[2]), "feed-forward" if "think" in name else "attention")
    for name in MIXERS[1:-1]
}
MIXED |= {"net.glyphs.weight": Place("embeddings"), "verdict.weight": Place("head")}


def test_a_users_own_row(monkeypatch):
    with pytest.raises(ValueError, match="no list of layers.*net.cells.0.mix.weight"):
        places(stand_in(MIXERS))
    row = Convention("cells", "mix|mix_scale", "think", "glyphs")
    monkeypatch.setattr(slowfast, "CONVENTIONS", [*slowfast.CONVENTIONS, row])
    assert places(stand_in(MIXERS)) == (MIXED, 12)


def test_a_users_row_for_a_list_that_another_row_knows(monkeypatch):
    names = [name.replace("cells", "layers") for name in MIXERS]
    with pytest.raises(ValueError, match="net.layers.0.mix.weight: neither"):
        places(stand_in(names))
    row = Convention("layers", "mix|mix_scale", "think", "glyphs")
    monkeypatch.setattr(slowfast, "CONVENTIONS", [*slowfast.CONVENTIONS, row])
    assert places(stand_in(names)) == ({name.replace("cells", "layers"): at for name, at in MIXED.items()}, 12)
    assert places(build("LlamaModel", num_hidden_layers=2))[1] == 2  # whose row still stands


def test_a_users_own_places():
    model = stand_in(MIXERS)
    cells = {id(p): group["name"] for group in param_groups(model, (MIXED, 12)) for p in group["params"]}
    assert cells == {id(p): cell_by_hand(MIXED[name]) for name, p in model.named_parameters()}


WRONG = {  # -> (the places, what the message says)
    "none for a weight": (({name: at for name, at in MIXED.items() if "5.think" not in name}, 12), "net.cells.5.think"),
    "a hole": (({**MIXED, **dict.fromkeys(MIXERS[4:7], Place("head"))}, 12), r"12 layers.*\[0, 2, 3"),
    "another depth": ((MIXED, 13), "13 layers"),
    "a layer without a block": (({**MIXED, MIXERS[4]: Place("layer", 1)}, 12), "net.cells.1.mix.weight.*attention"),
    "an unknown part": (({**MIXED, MIXERS[0]: Place("embedding")}, 12), "net.glyphs.weight.*embeddings"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_places_raise(kind):
    own, said = WRONG[kind]
    with pytest.raises(ValueError, match=said):
        param_groups(stand_in(MIXERS), own)


def test_what_is_frozen_needs_no_place():
    model = stand_in([*MIXERS, "other.weight"])
    model.other.requires_grad_(False)
    assert param_groups(model, (MIXED, 12))
