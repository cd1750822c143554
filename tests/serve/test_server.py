"""The server and the command line as processes: they start, drain, die, and say so."""

import http.client
import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from tests.processes import run_python, started

pytestmark = pytest.mark.processes
ASK = {"messages": [{"role": "user", "content": "What is a block table?"}]}


def post(port, body, path="/v1/chat/completions"):
    """(status, body) of a request to a server on this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


@contextmanager
def server(*command):
    """The process of a server, and its port once it listens."""
    with started(*(command or (sys.executable, "-m", "nanovllm", "serve", "--port", "0",
                               "--num-kvcache-blocks", "512", "--device", "cpu"))) as process:
        for line in process.stderr:
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail("the server did not start")
        yield process, int(found[1])


def told_to_end(process, port, **wishes):
    """(status, body) of a whole answer and of a stream, which SIGTERM meets in their middle."""
    bodies = [{**ASK, "ignore_eos": True, "stream": stream, **wishes} for stream in (False, True)]
    with ThreadPoolExecutor(2) as clients:
        answers = clients.map(partial(post, port), bodies)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        return list(answers)


def test_sigterm_lets_answers_end_and_exits_0():
    with server() as (process, port):
        found = told_to_end(process, port, max_tokens=600)
        assert [status for status, _ in found] == [200, 200]
        assert all('"finish_reason": "length"' in body for _, body in found)
        assert process.wait(30) == 0


def test_what_does_not_end_in_time_ends_by_an_error():
    """A stream says so, a whole answer is 503; neither is cut off without a word."""
    with server(sys.executable, "-m", "nanovllm", "serve", "--port", "0", "--device", "cpu",
                "--num-kvcache-blocks", "512", "--drain-timeout", "2") as (process, port):
        whole, stream = told_to_end(process, port, max_tokens=4000, n=16)
        assert whole[0] == 503 and "engine_dead" in whole[1]
        assert stream[0] == 200 and stream[1].endswith("data: [DONE]\n\n")
        assert '"code": "engine_dead"' in stream[1]
        err = process.communicate(timeout=30)[1]
        assert process.returncode == 0 and "Traceback" not in err, err


@pytest.mark.parametrize("option, value", [
    ("--port", "99999"), ("--port", "-1"), ("--max-waiting", "-600"), ("--drain-timeout", "-1"),
    ("--request-timeout", "-1"), ("--request-timeout", "nan")])
def test_numbers_that_cannot_be_meant(option, value, capsys):
    from nanovllm.cli import main
    try:
        status = main(["serve", option, value])
    except SystemExit as end:                    # argparse's
        status = end.code
    err = capsys.readouterr().err
    assert status and option in err and "Traceback" not in err and len(err) < 3000


def test_ctrl_c_ends_an_idle_server_with_0():
    code = ("from nanovllm import LLM\nfrom nanovllm.serve.server import serve\nimport sys, time\n"
            "class Slow(LLM):\n"
            "    def __exit__(self, *exception):\n"
            "        time.sleep(1); super().__exit__(*exception)\n"
            "        print('closed', file=sys.stderr, flush=True)\n"
            "sys.exit(serve(lambda: Slow(device='cpu', num_kvcache_blocks=64), port=0))")
    with server(sys.executable, "-c", code) as (process, port):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert "closed" in err                       # it was waited for


def test_ctrl_c_while_the_model_loads_exits_130():
    code = ("import sys, time\nfrom nanovllm import cli\n"
            "def LLM(*args, **settings):\n"
            "    print('loading', file=sys.stderr, flush=True); time.sleep(60)\n"
            "cli.LLM = LLM\nsys.exit(cli.main(['serve', '--port', '0']))")
    with started(sys.executable, "-c", code) as process:
        assert process.stderr.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and not err, err


def test_by_which_names_a_server_on_loopback_may_be_called():
    with server() as (process, port):
        for host, status in ((f"[::1]:{port}", 200), ("[::1]", 200), (f"localhost:{port}", 200),
                             ("127.0.0.1", 200), ("evil.example", 400), ("[::2]:80", 400)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()


def test_a_dead_engine_answers_503_and_exits_1():
    code = ("from nanovllm import LLM\nfrom nanovllm.serve.server import serve\nimport sys\n"
            "class Dying(LLM):\n"
            "    def step(self):\n"
            "        if self.stats.steps > 20: raise RuntimeError('the device is lost')\n"
            "        return super().step()\n"
            "sys.exit(serve(lambda: Dying(device='cpu', num_kvcache_blocks=512), port=0))")
    with server(sys.executable, "-c", code) as (process, port):
        status, body = post(port, ASK)
        assert status == 503 and json.loads(body)["error"]["code"] == "engine_dead"
        out, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "the device is lost" in err


def test_a_port_in_use_and_a_missing_model_are_errors():
    with server() as (process, port):
        result = run_python("-m", "nanovllm", "serve", "--port", port, "--num-kvcache-blocks", "64")
        assert result.returncode and "address already in use" in result.stderr
    result = run_python("-m", "nanovllm", "serve", "--model", "/nowhere")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "there is no folder '/nowhere'" in result.stderr


@pytest.mark.slow
def test_many_connections_come_and_go():
    """Texts are right, memory is flat, every block is free; then SIGTERM, and 0."""
    import asyncio

    import psutil
    openai = pytest.importorskip("openai")

    async def one(client, i, wrong):
        try:
            if i % 3 == 0:
                stream = await client.chat.completions.create(
                    model="demo", **ASK, stream=True, max_tokens=2000,
                    extra_body={"ignore_eos": True})
                async for _ in stream:
                    break
                await stream.close()
            elif i % 10 == 1:
                await client.chat.completions.create(model="demo", **ASK, temperature=-1)
            else:
                answer = await client.chat.completions.create(model="demo", **ASK)
                wrong.add(answer.choices[0].message.content)
        except openai.BadRequestError:
            pass

    async def many(port, count):
        texts = set()
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x",
                                      timeout=120) as client:
            await asyncio.gather(*(one(client, i, texts) for i in range(count)))
        return texts

    with server() as (process, port):
        texts = set()
        for _ in range(4):                           # until every shape of a step was there once
            texts |= asyncio.run(many(port, 128))
        memory = psutil.Process(process.pid).memory_info
        children = psutil.Process(process.pid).children(recursive=True)
        served = children[0].memory_info if children else memory
        before = served().rss
        for _ in range(4):
            texts |= asyncio.run(many(port, 128))
        assert len(texts) == 1
        assert served().rss < before + 60e6
        connection = http.client.HTTPConnection("127.0.0.1", port)
        deadline = time.monotonic() + 20
        while True:
            connection.request("GET", "/metrics")
            values = connection.getresponse().read().decode()
            if 'kv_cache_usage_perc{model_name="demo"} 0.0' in values:
                break
            assert time.monotonic() < deadline, values
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


# -----------------------------------------------------------------------------------------------
# generate, chat
# -----------------------------------------------------------------------------------------------

def nanovllm(*arguments, **options):
    return run_python("-m", "nanovllm", *arguments, **options)


def test_help_and_version():
    import nanovllm as package
    assert nanovllm("--version").stdout == f"nanovllm {package.__version__}\n"
    told = nanovllm("--help").stdout
    assert all(command in told for command in ("serve", "generate", "chat"))
    told = nanovllm("serve", "--help").stdout
    assert "--api-key" in told and "--max-model-len" in told
    assert nanovllm().returncode == 2


def test_generate_prints_what_generate_says(demo):
    from nanovllm import SamplingParams
    params = SamplingParams(temperature=0, max_tokens=8)
    want = [o["text"] for o in demo.generate(["A block", "TTFT"], params, use_tqdm=False)]
    options = ("--max-tokens", 8, "--device", "cpu", "--num-kvcache-blocks", 64)
    assert nanovllm("generate", "A block", *options).stdout == want[0] + "\n"
    assert nanovllm("generate", "A block", "TTFT", *options).stdout == "\n".join(want) + "\n"
    wrong = nanovllm("generate", "A block", "--max-tokens", 0)
    assert wrong.returncode == 1 and "max_tokens must be at least 1" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


def test_chat_remembers_until_it_is_told_to_forget(demo):
    question = {"role": "user", "content": "What is TTFT?"}
    first = demo.chat([question], demo.default_sampling_params(max_tokens=9), use_tqdm=False)
    answer = {"role": "assistant", "content": first[0]["text"]}
    second = demo.chat([question, answer, question], demo.default_sampling_params(max_tokens=9),
                       use_tqdm=False)
    with started(sys.executable, "-m", "nanovllm", "chat", "--max-tokens", 9, "--device", "cpu",
                 "--num-kvcache-blocks", 64, stdin=-1) as process:
        asked = "What is TTFT?\n" * 2 + "/new\n" + "What is TTFT?\n"
        out, err = process.communicate(asked, timeout=120)
    answers = [line.removeprefix("> ").removeprefix("> ") for line in out.splitlines()[1:4]]
    assert process.returncode == 0, err
    assert answers == [first[0]["text"], second[0]["text"], first[0]["text"]]


def test_without_the_server_the_other_commands_work():
    code = ("import sys\nsys.modules['nanovllm.serve'] = None\nfrom nanovllm.cli import main\n"
            "assert main(['generate', 'A block', '--max-tokens', '2', '--device', 'cpu',\n"
            "             '--num-kvcache-blocks', '64']) == 0\nsys.exit(main(['serve']))")
    result = run_python("-c", code)
    assert result.returncode == 1 and "nanovllm serve needs" in result.stderr
    assert "Traceback" not in result.stderr
