"""The program in pipes: what goes to which stream, JSON documents, and every exit code provoked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qwenrun.demo import model_dir
from qwenrun.quant.packfile.layout import MANIFEST
from qwenrun.text.template import render
from qwenrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from conftest import Run


def notes(stderr: str) -> str:
    """stderr without the progress that a slow machine earns."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("reading: "))


# -- the answer and nothing else ------------------------------------------------------------------------------


def test_one_answer_in_a_pipe(qwenrun: Run, demo_pack: Path, question: str, answer: dict[str, Any]) -> None:
    done = qwenrun("chat", "-m", demo_pack, "-p", question, "--temperature", "0", "--think", "--stats")
    assert done.returncode == 0
    assert done.stdout == answer["answer"].rstrip("\n") + "\n"
    assert "\x1b" not in done.stdout + done.stderr
    assert answer["reasoning"].strip() not in done.stdout + done.stderr
    plan, speed, prompt, rest = notes(done.stderr).splitlines()
    assert re.match(r"RAM [\d.]+ MiB: weights .*, KV@4k .*, experts 64 of 64 \(100%\)", plan)
    assert re.fullmatch(r"prompt \d+ tokens .* tok/s, answer \d+ tokens .*", speed)
    assert re.fullmatch(r"experts of the prompt: hits [\d.]+%, .* a token from disk, stalled .*", prompt)
    assert rest.startswith("experts of the answer: hits ")


def test_piped_text_and_the_prompt_are_one_question(qwenrun: Run, demo_pack: Path) -> None:
    log = "error: <|im_start|> is not a file\n  größer als 4 GiB\n"
    options = ("-p", "why?", "--no-think", "--max-tokens", "1", "--json")
    document = json.loads(qwenrun("chat", "-m", demo_pack, *options, stdin=log).stdout)
    tokenizer = Tokenizer.load(model_dir())
    messages = [{"role": "user", "content": f"{log.rstrip()}\n\nwhy?"}]
    parts = render(messages, add_generation_prompt=True, enable_thinking=False, thinking_default=False)
    # In a file a control token's spelling is text: as many tokens as its letters make, not one.
    assert document["stats"]["prompt_tokens"] == len(tokenizer.encode_parts(parts))


def test_piped_text_alone_and_the_embedded_model(qwenrun: Run, question: str) -> None:
    done = qwenrun("chat", "--max-tokens", "2", stdin=f"{question}\n")
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    first, plan, last = notes(done.stderr).splitlines()
    assert "demo" in first
    assert plan.startswith("RAM ")
    assert "--max-tokens 2" in last


def test_the_same_seed_gives_the_same_answer(qwenrun: Run, demo_pack: Path) -> None:
    options = ("--temperature", "5", "--seed", "1", "--max-tokens", "16", "--json")
    done = [qwenrun("chat", "-m", demo_pack, "-p", "Tell me a story", *options) for _ in range(2)]
    answers = [json.loads(each.stdout)["answer"] for each in done]
    assert answers[0] == answers[1]


# -- documents ------------------------------------------------------------------------------------------------

CHAT_KEYS = {
    "": ["schema", "model", "answer", "reasoning", "finish_reason", "params", "stats"],
    "model": ["name", "path", "pack"],
    "params": [
        *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "repetition_penalty", "seed"),
        *("max_tokens", "think", "ctx", "kv"),
    ],
    "stats": [
        *("prompt_tokens", "cached_tokens", "generated_tokens", "decode_steps", "prefill_seconds"),
        *("decode_seconds", "prefill_experts", "decode_experts"),
        *("prefill_tokens_per_second", "decode_tokens_per_second"),
    ],
}


def test_chat_document(answer: dict[str, Any], demo_pack: Path) -> None:
    assert answer["schema"] == "qwenrun.chat/1"
    for key, names in CHAT_KEYS.items():
        assert list(answer[key] if key else answer) == names
    assert answer["model"] == {"name": "demo.pack", "path": str(demo_pack), "pack": True}
    assert answer["finish_reason"] == "stop"
    assert answer["params"]["temperature"] == 0


def test_quantize_document(demo_report: dict[str, Any]) -> None:
    names = ["schema", "pack", "recipe", "source_bytes", "pack_bytes", "seconds", "notes", "tensors"]
    assert list(demo_report) == names
    assert demo_report["schema"] == "qwenrun.quantize/1"
    tensor = demo_report["tensors"][0]
    assert {"name", "part", "shape", "format", "bytes", "bits_per_weight", "sqnr_db", "nmse", "note"} <= set(tensor)
    routed = [t for t in demo_report["tensors"] if t["part"] == "routed"]
    assert routed
    assert all(t["format"] == "int4-g128" and 15 < t["sqnr_db"] < 30 for t in routed)
    assert demo_report["pack_bytes"] < demo_report["source_bytes"] / 2


def test_quantize_prints_its_table_on_stdout(qwenrun: Run, tmp_path: Path) -> None:
    done = qwenrun("quantize", model_dir(), "-o", tmp_path / "new.pack", "--recipe", "nvfp4")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["tensor", "format", "count", "size", "bits", "mean", "dB", "min", "dB"]
    assert next(line for line in lines if line.startswith("mlp.experts.down_proj")).split()[1] == "nvfp4"
    assert next(line for line in lines if line.startswith("total"))
    assert "\x1b" not in done.stdout + done.stderr
    assert "qwenrun chat -m" in done.stderr.splitlines()[-1]
    again = qwenrun("quantize", model_dir(), "-o", tmp_path / "new.pack")
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert again.stdout == ""


def test_show(qwenrun: Run, demo_pack: Path, demo_report: dict[str, Any]) -> None:
    document = json.loads(qwenrun("show", demo_pack, "--json", "--tensors").stdout)
    assert document["schema"] == "qwenrun.show/1"
    assert document["recipe"]["name"] == "balanced"
    assert len(document["tensors"]) == len(demo_report["tensors"])
    assert sum(part["bytes"] for part in document["parts"]) == document["weight_bytes"]
    assert document["weight_bytes"] == sum(tensor["bytes"] for tensor in demo_report["tensors"])
    on_disk = {file.name: file.stat().st_size for file in demo_pack.iterdir() if file.name != MANIFEST}
    assert {name: file["bytes"] for name, file in document["files"].items()} == on_disk
    source = document["source"]["files"]
    assert source["model.safetensors"]["bytes"] == (model_dir() / "model.safetensors").stat().st_size
    text = qwenrun("show", demo_pack)
    assert text.stderr == ""
    assert "routed" in text.stdout
    assert "bits a weight" in text.stdout


def test_vram(qwenrun: Run, demo_pack: Path) -> None:
    done = qwenrun("vram", "--ctx", "4k,262144", "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "qwenrun.vram/1"
    assert [context["ctx"] for context in document["contexts"]] == [4096, 262144]
    small, large = (context["bytes"] for context in document["contexts"])
    # 24,576 bytes of keys and values a token, in 12 layers and no others.
    assert large["kv"] == 262144 * 24576
    assert small["state"] == large["state"]
    assert small["total"] == sum(value for part, value in small.items() if part != "total")
    text = qwenrun("vram", demo_pack, "--ctx", "1k").stdout
    assert re.search(r"^total +\d", text, re.MULTILINE)


def test_bench_document(qwenrun: Run, demo_pack: Path) -> None:
    options = ("--prompt-tokens", "8", "--gen-tokens", "2", "--runs", "2", "--json", "--quiet")
    done = qwenrun("bench", "-m", demo_pack, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["schema"] == "qwenrun.bench/1"
    assert len(document["decode_tokens_per_second"]["runs"]) == 2
    assert document["ctx"] == 10
    assert document["bytes_per_token"] > 1e6
    assert document["read_bandwidth_bytes_per_second"] > document["achieved_bytes_per_second"]


def test_eval_of_a_file(qwenrun: Run, demo_pack: Path, question: str, answer: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": question, "answer": answer["answer"]}, {"question": question, "answer": "No."}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = qwenrun("eval", "-m", demo_pack, "--pairs", tmp_path / "two.jsonl", "--think", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "qwenrun.eval/1"
    figures = document["sets"][0]
    assert (figures["name"], figures["questions"], figures["exact"], figures["rate"]) == ("two", 2, 1, 0.5)


def test_observe_then_quantize_by_it(qwenrun: Run, tmp_path: Path) -> None:
    text, out, pack = tmp_path / "t.txt", tmp_path / "t.importance", tmp_path / "p"
    text.write_text("<|im_start|>user\nWhat is a pack?<|im_end|>\n" * 40)
    done = qwenrun("observe", text, "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "observed" in done.stderr
    again = qwenrun("observe", text, "-o", out)
    assert str(out) in failed(again, 2)
    piped = qwenrun(
        "observe", "-", "-o", out, "--force", "--tokens", "100", "--json", "--quiet", stdin=text.read_text()
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    said = json.loads(piped.stdout)
    assert (said["schema"], said["tokens"], said["text"]) == ("qwenrun.observe/1", 100, "stdin")
    made = qwenrun("quantize", model_dir(), "-o", pack, "--importance", out)
    assert "of 45 tensors by t.importance" in made.stderr
    assert "100 tokens of stdin, read by demo" in qwenrun("show", pack).stdout
    assert "t.txt" in failed(qwenrun("quantize", model_dir(), "-o", tmp_path / "q", "--importance", text), 3)
    assert "no file" in failed(
        qwenrun("quantize", model_dir(), "-o", tmp_path / "q", "--importance", tmp_path / "x"), 2
    )


def test_observe_what_can_not_be_read(qwenrun: Run, tmp_path: Path) -> None:
    out = tmp_path / "i"
    assert "can't be read" in failed(qwenrun("observe", tmp_path / "no", "-o", out), 2)
    assert "empty" in failed(qwenrun("observe", "-", "-o", out, "-q"), 2)
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    assert "not UTF-8" in failed(qwenrun("observe", tmp_path / "latin", "-o", out, "-q"), 2)
    assert not out.exists()


def test_eval_beside_another(qwenrun: Run, demo_pack: Path, question: str, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": question, "answer": "No."}))
    options = ("--pairs", tmp_path / "one.jsonl", "--beside", model_dir())
    done = qwenrun("eval", "-m", demo_pack, *options, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    (beside,) = json.loads(done.stdout)["beside"]["sets"]
    assert 0 < beside["divergence"] < 1
    assert "same likeliest" in qwenrun("eval", "-m", demo_pack, *options).stdout
    assert "no model" in failed(qwenrun("eval", "-m", demo_pack, "--beside", tmp_path / "no"), 3)


# -- exit codes -----------------------------------------------------------------------------------------------


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Check that it failed as it should; the error's first line."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    error = next(line for line in lines if line.startswith("error: "))
    assert any(line.startswith("hint: ") for line in lines)
    return error


def test_0_and_verify(qwenrun: Run, demo_pack: Path) -> None:
    done = qwenrun("verify", demo_pack)
    assert done.returncode == 0
    assert "every sha256 as written" in done.stdout


def test_2_usage(qwenrun: Run) -> None:
    assert "empty" in failed(qwenrun("chat"), 2)
    assert "'quantize'" in failed(qwenrun("quantise"), 2)


def test_3_missing(qwenrun: Run, tmp_path: Path) -> None:
    assert str(tmp_path / "no") in failed(qwenrun("chat", "-m", tmp_path / "no", "-p", "x"), 3)
    assert str(tmp_path) in failed(qwenrun("show", tmp_path), 3)
    assert "config.json" in failed(qwenrun("quantize", tmp_path, "-o", tmp_path / "p"), 3)


def test_3_corrupt(qwenrun: Run, demo_pack: Path, tmp_path: Path) -> None:
    pack = shutil.copytree(demo_pack, tmp_path / "damaged.pack")
    file = pack / "experts-01.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    assert "experts-01.bin" in failed(qwenrun("verify", pack), 3)


def test_4_does_not_fit(qwenrun: Run, demo_pack: Path) -> None:
    error = failed(qwenrun("chat", "-m", demo_pack, "-p", "x", "--ram", "100MiB"), 4)
    assert "more than the 100 MiB there are" in error
    done = qwenrun("vram", "--ctx", "4k", "--ram", "4GiB")
    assert done.returncode == 4
    assert "total" in done.stdout
    assert "4.00 GiB" in done.stderr
    assert qwenrun("vram", "--ctx", "4k", "--ram", "8GiB").returncode == 0


LONG = ("--temperature", "100", "--seed", "5", "--ctx", "4k")


def start(home: Path, *arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
    env = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qwenrun", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, **streams)


def test_130_interrupted(home: Path, demo_pack: Path) -> None:
    process = start(home, "chat", "-m", demo_pack, "-p", "Tell me a story", *LONG, stdout=subprocess.PIPE)
    assert process.stdout
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    plan, said = notes(err.decode()).splitlines()
    assert (plan[:4], said) == ("RAM ", "interrupted")


def test_141_nobody_reads(home: Path, demo_pack: Path) -> None:
    process = start(home, "chat", "-m", demo_pack, "-p", "Tell me a story", *LONG, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr
    assert re.fullmatch(r"RAM .*\n", notes(process.stderr.read().decode()))


def test_1_a_full_disk_is_no_success(home: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        process = start(home, "vram", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.decode().startswith("error: ")
    assert "Traceback" not in err.decode()


def test_a_closed_stdout_is_no_crash(home: Path) -> None:
    process = start(home, "vram", preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_text_in_any_locale(qwenrun: Run, demo_pack: Path) -> None:
    done = qwenrun("show", demo_pack, LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
