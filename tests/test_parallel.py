"""Several processes: two of them take the gradient, and write the run, of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from loss import IGNORE, Sequence
from model import Config, Llama
from train import Recipe, add_up, join_team, own_share, team, train_step

HERE = Path(__file__).resolve().parent
SIZES = {"six": 6, "five": 5, "one": 1}  # sequences of each kind; with one, a process has nothing


def batch(n: int) -> tuple[list[Sequence], list[Sequence]]:
    """n random sequences of each kind, of different lengths, their first two tokens unlabelled."""
    draw = torch.Generator().manual_seed(n)
    texts = [torch.randint(50, (3 + 2 * i,), generator=draw).tolist() for i in range(2 * n)]
    made = [Sequence(ids, [IGNORE] * 2 + ids[2:]) for ids in texts]
    return made[::2], made[1::2]


def gradients(n: int) -> dict[str, torch.Tensor]:
    """The adapter's gradient, losses and norm of one step on a batch; every process calls this."""
    torch.manual_seed(0)
    model = Llama(Config(50, 32, 48, 2, 2, 2, 16))
    lora.add_lora(model, rank=4, alpha=8, dropout=0.0)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    optimizer = torch.optim.SGD(lora.adapter_parameters(model), lr=0.0)
    losses = train_step(model, optimizer, *batch(n), Recipe(clip=1e9, micro_tokens=20))
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found | {"losses": torch.tensor(losses)}


def torchrun(*command) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [str(word) for word in (*launcher, *command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes holds after the steps."""
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(__file__, out)
    assert done.returncode == 0, done.stderr
    return [load_file(out / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_two_processes_have_the_gradient_of_one(ranks, size):
    """Each of two gloo processes ends a step with the gradient, losses and norm of one alone."""
    for name, alone in gradients(SIZES[size]).items():
        for rank in ranks:
            torch.testing.assert_close(rank[f"{size} {name}"], alone, rtol=1e-4, atol=1e-7)


def test_the_work_is_shared(ranks):
    """Of six sequences each process computes three, and nearly the same number of tokens."""
    shares = [rank["share"].tolist() for rank in ranks]
    assert sorted(shares[0] + shares[1]) == sorted(len(s.ids) for s in batch(6)[0])
    assert len(shares[0]) == len(shares[1]) == 3
    assert abs(sum(shares[0]) - sum(shares[1])) <= max(shares[0] + shares[1])


def test_one_process_needs_no_team():
    """Without torchrun there is one process, it has the whole batch, and nothing is exchanged."""
    sequences, means = batch(4)[0], torch.ones(2)
    add_up([], means)
    assert team() == (0, 1) and own_share(sequences) is sequences and means.tolist() == [1, 1]


def listing(folder: Path) -> Path:
    """genpi.py with given pseudo inputs, since random weights write none."""
    script = folder / "listing.py"
    script.write_text(
        "import sys, genpi, synth\n"
        "synth.more_inputs = lambda *_: ['a b', 'c d', 'e f', 'g h']\n"
        "sys.exit(genpi.main())\n"
    )
    return script


def test_a_mistake_under_torchrun_is_one_line(tmp_path, checkpoint):
    """What every process finds wrong is said by the first alone."""
    (tmp_path / "p.txt").write_text("Say yes.")
    flags = [f"--model={checkpoint}", f"--out={tmp_path / 'run'}", "--device=cpu", "--rank=999"]
    flags.append(f"--prompt={tmp_path / 'p.txt'}")
    done = torchrun(HERE.parent / "genpi.py", *flags)
    assert done.returncode != 0 and done.stderr.count("error: rank 999") == 1


def test_the_whole_command_under_torchrun(tmp_path, checkpoint):
    """Two processes make one run: every record, step and file once, and a report at the end."""
    out, prompt = tmp_path / "run", tmp_path / "p.txt"
    prompt.write_text("Say yes.")
    sizes = "--samples=3 --held-out=1 --epochs=2 --batch=2 --rank=2".split()
    sizes += "--max-new-tokens=8 --max-reason-tokens=8".split()
    where = [f"--model={checkpoint}", f"--prompt={prompt}", f"--out={out}", "--device=cpu"]
    done = torchrun(listing(tmp_path), *where, *sizes)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len((out / "data.jsonl").read_text().splitlines()) == 4
    assert (out / "adapter_model.safetensors").exists() and (out / "report.json").exists()
    assert done.stdout.count("synthesis (GenPI Table 4)") == 1


if __name__ == "__main__":
    join_team("cpu")
    found = {f"{size} {k}": v for size, n in SIZES.items() for k, v in gradients(n).items()}
    found["share"] = torch.tensor([len(s.ids) for s in own_share(batch(6)[0])])
    save_file(found, Path(sys.argv[1]) / f"{team()[0]}.safetensors")
