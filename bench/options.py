"""The command line, and the engines that it names."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path

from bench.engines import ENGINES
from bench.models import SHAPES
from bench.workloads import WORKLOADS


def parse_args(argv: list[str] | None = None, about: str | None = None) -> argparse.Namespace:
    """The options, checked; about: what --help says first."""
    parser = argparse.ArgumentParser("bench.py", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is measured").add_argument
    add("--engines", nargs="*", choices=ENGINES, metavar="ENGINE",
        help=", ".join(ENGINES) + " (default: nanovllm hf)")
    add("--workload", nargs="+", choices=WORKLOADS, metavar="NAME",
        help=", ".join(WORKLOADS) + " (default: nano-vllm)")
    add("--ablate", action="store_true", help="this engine with each feature switched off in turn")
    add("--soak", type=float, metavar="MINUTES", help="random requests, aborts, bad requests "
        "and signals for so long: are memory, blocks and requests lost, and are tokens right?")
    add("--strikes", type=float, default=0.1, metavar="SHARE",
        help="--soak: the share of steps with a signal at a random time in them (default 0.1)")
    add("--deaths", type=int, metavar="N", help="--soak: kill a worker of an engine with two ranks "
        "so often, at random times (default: once a minute)")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FOLDER", help="a checkpoint (default: the bundled demo model)")
    add("--gguf", metavar="FILE", help="what llama-cpp runs: any GGUF file, of four bits too. With "
        "--model beside it the others run that folder; alone it is measured by itself")
    add("--shape", choices=SHAPES, help="random weights: " + ", ".join(SHAPES))
    add("--layers", type=int, metavar="N", help="with --shape: only so many layers")
    add("--device", default="cpu", help='"cpu" (default) or "cuda"')
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--threads", type=int, metavar="N", help="CPU threads of each engine (default: PyTorch's "
        "choice, but 1 for the demo model: it is so small that a second only costs)")
    add = parser.add_argument_group("workload").add_argument
    add("--scale", type=float, default=0.1, help="1 is full size, 256 requests of 100 to 1024 "
        "tokens in and out; less makes them fewer and shorter (default 0.1)")
    add("--requests", type=int, nargs="+", metavar="N", help="so many requests, whatever --scale "
        "says; several numbers are measured one after another")
    add("--rate", type=float, default=4.0, help="poisson: arrivals a second (default 4)")
    add("--seed", type=int, default=0)
    add("--runs", type=int, default=3, help="runs of each workload by each engine (default 3)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--limit", type=float, default=300.0, metavar="SECONDS",
        help="cut a run after so long (default 300); its rates are then of what it did")
    add = parser.add_argument_group("engines").add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of this engine, for all its configurations; may be given several times")
    add("--config", action="append", default=[], metavar="NAME:KEY=VALUE,...",
        help="a further configuration of this engine, e.g. eager:enforce_eager=True; "
        "static_batch=8 serves eight at a time, each batch to its end")
    add("--rows", type=int, default=8, metavar="N", help="--ablate: rows of a batch (default 8)")
    add("--hf-batch", type=int, default=8, metavar="N", help="hf: rows of a batch (default 8)")
    add("--vllm-python", metavar="PATH", help="the Python of an environment that has vLLM")
    add("--vllm-set", action="append", default=[], metavar="KEY=VALUE", help="a setting of vLLM")
    add("--nano-vllm-set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of nano-vllm")
    add("--vllm-config", action="append", default=[], metavar="NAME:KEY=VALUE,...",
        help="a further configuration of vLLM, e.g. compiled:enforce_eager=False")
    add("--llama-python", metavar="PATH", help="the Python of an environment that has "
        "llama-cpp-python (CPU only; without --gguf, Qwen3 only)")
    add("--nano-vllm", metavar="FOLDER", help="a checkout of GeeeekExplorer/nano-vllm")
    add("--keep", action=argparse.BooleanOptionalAction, help="keep all engines loaded between "
        "runs (default: on a CPU; a GPU holds one at a time)")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write every figure to this file")
    add("--plot", metavar="FILE", help="draw the figures into this file (.png, .svg)")
    add("--markdown", action="store_true", help="tables that a README can take")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.keep = args.device == "cpu" if args.keep is None else args.keep
    if args.engines is None:
        args.engines = ["nanovllm"] if args.model or not args.gguf else []
        args.engines += ["llama-cpp" if args.gguf else "hf"]
    try:
        check(args)
        engine_list(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args) -> None:
    """ValueError for options that cannot be meant."""
    for name in ("scale", "rate", "runs", "hf_batch", "rows", "limit", "soak", "threads", "layers"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
    if not 0 <= args.strikes <= 1:
        raise ValueError("--strikes must lie in [0, 1]")
    if args.deaths is not None and args.deaths < 0:
        raise ValueError("--deaths must be at least 0")
    fewest = 1 if args.workload == ["decode"] else 2  # the others are about requests side by side
    if args.requests is not None and min(args.requests) < fewest:
        raise ValueError(f"--requests must be at least {fewest}")
    if args.model and args.shape:
        raise ValueError("give --model or --shape, not both")
    if args.model and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--model: {args.model} holds no config.json; a GGUF file is given by "
                         "--gguf, and only llama-cpp reads it")
    if args.gguf:
        check_gguf(args)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def check_gguf(args) -> None:
    """ValueError for --gguf where it cannot be meant."""
    file = Path(args.gguf)
    if not file.is_file() or file.open("rb").read(4) != b"GGUF":
        raise ValueError(f"--gguf: {args.gguf} is no GGUF file")
    if args.shape or args.soak or args.ablate:
        raise ValueError("--gguf goes neither with --shape nor with --soak nor with --ablate")
    others = sorted({*args.engines, *["nanovllm"] * bool(args.config)} - {"llama-cpp"})
    if others and not args.model:
        raise ValueError(f"--gguf: only llama-cpp reads the file, not {', '.join(others)}; give "
                         "the same model's folder with --model")
    if "llama-cpp" not in args.engines:
        raise ValueError("--gguf: engine llama-cpp is not asked for")


def parse_settings(texts: list[str]) -> dict:
    """{"enforce_eager": True} from ["enforce_eager=True"]; ValueError for what is no setting."""
    settings = {}
    for part in filter(None, (part for text in texts for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"{part!r} is not KEY=VALUE")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def engine_list(args) -> dict[str, tuple[str, dict]]:
    """What is compared: name -> (engine, settings). ValueError for an option that is none."""
    given = {"nanovllm": parse_settings(args.set), "vllm": parse_settings(args.vllm_set),
             "nano-vllm": parse_settings(args.nano_vllm_set)}
    engines = {name: (name, given.get(name, {})) for name in args.engines}
    for kind, option, texts in (("nanovllm", "--config", args.config),
                                ("vllm", "--vllm-config", args.vllm_config)):
        for text in texts:
            name, colon, settings = text.partition(":")
            if not colon or not (name := name.strip()):
                raise ValueError(f"{text!r} is not NAME:KEY=VALUE,KEY=VALUE")
            if name in engines:
                raise ValueError(f"{option}: there are two engines called {name!r}")
            engines[name] = (kind, {**given[kind], **parse_settings([settings])})
    check_settings({key for kind, settings in engines.values() if kind == "nanovllm"
                    for key in settings} - {"static_batch"})
    kinds = {kind for kind, _ in engines.values()}
    if "nano-vllm" in kinds and not args.nano_vllm:
        raise ValueError("engine nano-vllm: give the folder of its repository with --nano-vllm")
    if "vllm" in kinds and not (args.vllm_python or importlib.util.find_spec("vllm")):
        raise ValueError("engine vllm: it is not installed here; give the Python of an environment "
                         "that has it with --vllm-python")
    if "llama-cpp" in kinds and not (args.llama_python or importlib.util.find_spec("llama_cpp")):
        raise ValueError("engine llama-cpp: give the Python of an environment that has "
                         "llama-cpp-python with --llama-python")
    return engines


def check_settings(names: set[str]) -> None:
    """ValueError for a name that is no setting of this engine."""
    if names:
        from dataclasses import fields

        from nanovllm.config import Config  # brings PyTorch: only if there is something to check
        known = {field.name for field in fields(Config) if field.init}
        if unknown := sorted(names - known):
            raise ValueError(f"{', '.join(unknown)}: no such setting of this engine; there are: "
                             f"{', '.join(sorted(known))}")
