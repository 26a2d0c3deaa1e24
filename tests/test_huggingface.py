"""slowfast.py on Hugging Face's models and in its Trainer, from a folder that holds slowfast.py and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_slowfast import ATTENTION, FEED_FORWARD, REACH, oracle_curve  # noqa: E402

from slowfast import METHODS, param_groups, prepare, warmup_then_decay  # noqa: E402

LINE = "# ===== If you copied this file"

# --- the weight sets ------------------------------------------------------------------------------------------


def tiny(family, depth=12, **options):
    config = getattr(transformers, f"{family}Config")
    return config(vocab_size=100, hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=64,
                  max_position_embeddings=40, **options)  # fmt: skip


def grouped_names(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in param_groups(model)}
    assert sum(map(len, groups.values())) == len(names), "every parameter once"
    return {cell: set(group) for cell, group in groups.items()}


def listing(model, prefix, depth):
    """{cell: set of names}, written out from Section 3; whatever is in no layer is the rest."""

    def layers(numbers, names):
        return {f"{prefix}encoder.layer.{n}.{name}" for n in numbers for name in names}

    slow, key = REACH[depth]
    cells = {
        "S_II": layers(range(key), FEED_FORWARD),
        "S_I-S_II": layers(range(key), ATTENTION) | layers(range(key, slow), ATTENTION + FEED_FORWARD),
        "V_II": layers(range(slow, depth), ATTENTION),
        "V_I-V_II": layers(range(slow, depth), FEED_FORWARD),
        "rest": {name for name, _ in model.named_parameters() if ".layer." not in name},
    }
    return {cell: names for cell, names in cells.items() if names}


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner


@pytest.mark.parametrize(
    ("family", "head", "prefix"),
    [
        (family, head, "" if head == "Model" else prefix)
        for family, prefix in [("XLMRoberta", "roberta."), ("Roberta", "roberta."), ("Bert", "bert.")]
        for head in (
            "Model",
            "ForSequenceClassification",
            "ForQuestionAnswering",
            "ForTokenClassification",
            "ForMaskedLM",
        )
    ],
)
def test_the_cells_of_hugging_faces_models(family, head, prefix):
    model = getattr(transformers, family + head)(tiny(family))
    assert grouped_names(model) == listing(model, prefix, 12)


@pytest.mark.parametrize("depth", REACH)
def test_the_cells_at_other_depths(depth):
    model = transformers.XLMRobertaForSequenceClassification(tiny("XLMRoberta", depth))
    assert grouped_names(model) == listing(model, "roberta.", depth)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (Wrapper, "module.roberta."),
        (torch.nn.DataParallel, "module.roberta."),
        (torch.compile, "_orig_mod.roberta."),
        (lambda model: Wrapper(torch.compile(model)), "module._orig_mod.roberta."),
    ],
    ids=["an attribute", "DataParallel", "compile", "compile within"],
)
def test_the_cells_of_a_wrapped_model(wrap, prefix):
    model = wrap(transformers.XLMRobertaForSequenceClassification(tiny("XLMRoberta")))
    assert grouped_names(model) == listing(model, prefix, 12)


OTHERS = {
    "ALBERT": lambda: transformers.AlbertModel(tiny("Albert", embedding_size=16)),
    "DistilBERT": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=99, dim=32, n_heads=4, hidden_dim=64)
    ),
    "cross-attention": lambda: transformers.BertLMHeadModel(tiny("Bert", is_decoder=True, add_cross_attention=True)),
    "encoder and decoder": lambda: transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(tiny("Bert", 2)),
        decoder=transformers.BertLMHeadModel(tiny("Bert", 2, is_decoder=True)),
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_models_without_the_sets_are_refused_by_the_names_they_have(other):
    model = OTHERS[other]()
    with pytest.raises(ValueError) as e:
        param_groups(model)
    names = [name for name, _ in model.named_parameters()]
    assert any(name in str(e.value) or name.partition(".0.")[0] + "." in str(e.value) for name in names), e.value


@pytest.mark.parametrize("method", ["noisytune", "last-2", "freeze-4-ffn", "reinit-4-attention"])
def test_prepare_on_hugging_faces_xlmr(method):
    """The names there are those that the methods go by."""
    model = transformers.XLMRobertaForSequenceClassification(tiny("XLMRoberta"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    prepare(model, METHODS[method])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    layers = {n: {name for name in before if f".layer.{n}." in name} for n in range(12)}
    lowest = set.union(*(layers[n] for n in range(4)))
    in_head = {name for name in before if name.startswith("classifier.")}
    assert len(in_head) == 4
    expected_changed, expected_frozen = {
        # a new model's biases are all 0: their standard deviation is, and so is the noise; LayerNorms are all 1
        "noisytune": ({n for n, w in before.items() if w.std() > 0} - in_head, set()),
        "last-2": (set(), set(before) - layers[10] - layers[11] - in_head),
        "freeze-4-ffn": (set(), {name for name in lowest if ".attention." not in name}),
        "reinit-4-attention": ({name for name in lowest if ".attention." in name and before[name].std() > 0}, set()),
    }[method]
    assert (changed, frozen) == (expected_changed, expected_frozen)


# --- the schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "warmup"), [(100, 0.1), (1000, 0.06), (37, 0.3), (20, 0.0), (10, 1.0), (5, 0.1), (1, 0.1)]
)
def test_the_schedule_is_transformers_linear_one(total, warmup):
    """Rates over all updates and some beyond the last."""

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = make(optimizer)
        for _ in range(total + 3):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()

    ours = list(rates(lambda o: torch.optim.lr_scheduler.LambdaLR(o, warmup_then_decay(total, warmup))))
    theirs = list(rates(lambda o: transformers.get_linear_schedule_with_warmup(o, round(total * warmup), total)))
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)


# --- slowfast.py alone, in a plain loop and in the Trainer ----------------------------------------------------

COMMON = """
import json, re, sys, textwrap, warnings
import torch
warnings.filterwarnings("error", message=".*observe.*")
import slowfast
from slowfast import SlowFast, param_groups

answer = {"imported from": slowfast.__file__, "runs": {}}

def model_of(seed=0):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification
    torch.manual_seed(seed)
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=20, num_labels=3, type_vocab_size=1, pad_token_id=1))

def examples(number):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(4, 100, (8,), generator=generator),
             "attention_mask": torch.ones(8, dtype=torch.long),
             "labels": int(torch.randint(0, 3, (), generator=generator))} for _ in range(number)]

def rates_of(optimizer):
    return {group["name"]: group["lr"] for group in optimizer.param_groups}

def watch(policies):
    # AdamW calls _init_group for each group inside its step: there the rates that are in force are seen
    in_force, observed, observe = [], [], policies.observe
    init_group = policies.optimizer._init_group

    def seen(group, *args, **kwargs):
        if group is policies.optimizer.param_groups[0]:
            in_force.append(rates_of(policies.optimizer))
        return init_group(group, *args, **kwargs)

    policies.optimizer._init_group = seen

    def observe_and_tell(loss):
        observed.append(float(loss))
        observe(loss)

    policies.observe = observe_and_tell
    return in_force, observed

def moved(model, begin):
    return [name for name, p in model.named_parameters() if not torch.equal(p, begin[name])]
"""

PLAIN = """
def plain(name, updates=8, **options):
    model = model_of()
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    policies = SlowFast(optimizer, **options)
    in_force, observed = watch(policies)
    rates, losses = [], []
    data = examples(4 * updates)
    for i in range(updates):
        part = data[4 * i : 4 * i + 4]
        inputs, labels = torch.stack([e["input_ids"] for e in part]), torch.tensor([e["labels"] for e in part])
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        policies.observe(loss)
        optimizer.step()
        rates.append(rates_of(optimizer))
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    answer["runs"][name] = {
        "rates": rates, "in force": in_force, "losses": losses, "observed": observed, "updates": policies.updates,
        "in P1": policies.updates_in_first_phase, "moved": moved(model, begin)}

plain("plain", window=2, threshold=0.0)
plain("plain, c1 = 0", c1=0)
"""

# The recipe is the one of slowfast.py's docstring, word for word.
TRAINER = """
from transformers import Trainer, TrainerCallback, TrainingArguments

recipe = re.search(r"^( +class SlowFastTrainer\\(Trainer\\).*?return result\\n)", slowfast.__doc__, re.S | re.M)[1]

class Recording(Trainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.micro_losses.append([self.state.global_step, float(loss)])
        return loss

class AfterStep(TrainerCallback):
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(rates_of(optimizer))

def trainer(name, accumulation, **options):
    model = model_of()
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    policies = SlowFast(optimizer, **options)
    in_force, observed = watch(policies)
    space = {"Trainer": Recording, "policies": policies}
    exec(textwrap.dedent(recipe), space)
    arguments = TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, num_train_epochs=2,
        learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    after = AfterStep()
    after.rates = []
    run = space["SlowFastTrainer"](model=model, args=arguments, train_dataset=examples(28), callbacks=[after],
                                   optimizers=(optimizer, None))
    run.micro_losses = []
    run.train()
    answer["runs"][name] = {
        "rates": after.rates, "in force": in_force, "micro": run.micro_losses, "observed": observed,
        "updates": policies.updates, "in P1": policies.updates_in_first_phase, "moved": moved(model, begin),
        "steps": run.state.global_step}

for accumulation in (1, 2):
    trainer(f"Trainer {accumulation}", accumulation, window=2, threshold=0.0)
trainer("Trainer, c1 = 0", 2, c1=0)
"""

END = """
answer["imported"] = sorted({"data", "model", "eval"} & set(sys.modules))
answer["path"] = sys.path
print(json.dumps(answer))
"""


def run_in(folder, source, script):
    """Puts `source` as slowfast.py, and the script, into the empty `folder`, runs the script there; its answer."""
    (folder / "slowfast.py").write_text(source, encoding="utf-8")
    (folder / "script.py").write_text(script, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["imported from"]) == folder / "slowfast.py"
    assert answer["imported"] == []
    assert str(ROOT) not in answer["path"]
    return answer["runs"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    source = (ROOT / "slowfast.py").read_text(encoding="utf-8")
    return run_in(tmp_path_factory.mktemp("whole"), source, COMMON + PLAIN + TRAINER + END)


@pytest.fixture(scope="module")
def truncated(tmp_path_factory):
    source, line, _ = (ROOT / "slowfast.py").read_text(encoding="utf-8").partition(LINE)
    assert line
    return run_in(tmp_path_factory.mktemp("truncated"), source, COMMON + PLAIN + END)


def oracle_K(losses, window, threshold, c1=0.01, c2=10):
    """(in P1, {cell: K}) of the method `slowfast` at the last of `losses`."""
    first, _, big_R = oracle_curve(losses, window, threshold=threshold)
    ones = dict.fromkeys(("S_I-S_II", "S_II", "V_I-V_II", "V_II", "rest"), 1)
    return first, ones | ({"S_I-S_II": c1, "S_II": c1} if first else {"S_II": big_R, "V_II": c2})


def check_K_in_force(run, scheduled, window, threshold):
    """Each step was made at K times the schedule's rate, and the schedule's rate is what was left behind."""
    phases = []
    assert len(run["in force"]) == len(run["rates"]) == len(run["observed"]) == len(scheduled)
    for t, rate in enumerate(scheduled, 1):
        first, K = oracle_K(run["observed"][:t], window, threshold)
        phases.append(first)
        assert run["in force"][t - 1] == pytest.approx({cell: k * rate for cell, k in K.items()}, rel=1e-9, abs=1e-15), t
        assert run["rates"][t - 1] == pytest.approx(dict.fromkeys(K, rate), rel=1e-12), t
    assert run["in P1"] == sum(phases)
    return phases


@pytest.mark.parametrize("file", ["whole", "truncated"])
def test_a_plain_loop_with_torchs_adamw(file, request):
    """Also with the file cut at its marked line."""
    run = request.getfixturevalue(file)["plain"]
    assert run["updates"] == 8
    assert run["observed"] == pytest.approx(run["losses"], rel=1e-6)
    phases = check_K_in_force(run, [1e-2 * 0.5**t for t in range(8)], window=2, threshold=0.0)
    assert set(phases) == {True, False}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_observes_each_update_once(accumulation, whole):
    """14 micro-batches in 2 epochs; an epoch's last update has one alone."""
    run = whole[f"Trainer {accumulation}"]
    assert run["updates"] == run["steps"] == len(run["observed"]) == {1: 14, 2: 8}[accumulation]
    assert len(run["micro"]) == 14


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainers_loss_is_the_mean_over_the_micro_batches(accumulation, whole):
    run = whole[f"Trainer {accumulation}"]
    means = [np.mean([loss for update, loss in run["micro"] if update == u]) for u in range(run["steps"])]
    assert run["observed"] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_steps_at_K_times_its_schedules_rate(accumulation, whole):
    """Linear: up over 2 updates, down to 0."""
    run = whole[f"Trainer {accumulation}"]
    total = run["steps"]
    scheduled = [1e-2 * (t / 2 if t < 2 else (total - t) / (total - 2)) for t in range(total)]
    phases = check_K_in_force(run, scheduled, window=2, threshold=0.0)
    assert set(phases) == {True, False}


@pytest.mark.parametrize(
    ("file", "run"), [("truncated", "plain, c1 = 0"), ("whole", "plain, c1 = 0"), ("whole", "Trainer, c1 = 0")]
)
def test_with_c1_0_the_first_phase_leaves_S_I_exactly_where_it_was(file, run, request):
    """The run is shorter than two windows. All others move, even under AdamW's weight decay."""
    moved = set(request.getfixturevalue(file)[run]["moved"])
    model = transformers.XLMRobertaForSequenceClassification(tiny("XLMRoberta", type_vocab_size=1, pad_token_id=1))
    S_I = {name for n in range(10) for name, _ in model.named_parameters() if f".layer.{n}." in name}
    assert len(S_I) == 160
    assert moved == {name for name, _ in model.named_parameters()} - S_I
