#!/usr/bin/env python3
"""Several replicas of the engine behind one address, by Ray Serve.

    pip install "ray[serve]"
    python tools/replicas.py --replicas 2 --model FOLDER

Each replica is a process with an engine of its own and the server of appendix C. Ray starts them,
hands each request to one that has room, and starts another where one has died. The address is on
loopback, until Ctrl-C. Ray's own ports are open to the network; who calls them needs the token that
Ray makes. Several hosts, and numbers that follow the load: https://docs.ray.io/en/latest/serve/.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import asynccontextmanager
from functools import partial


def start(replicas: int = 2, model: str | None = None, port: int = 8000, gpus: float = 0,
          **settings) -> None:
    """Start them; they serve in the background. gpus: of each. settings: the engine's."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray import serve

    def make_app():                              # runs in each replica's process
        from fastapi import FastAPI
        from nanovllm import LLM
        from nanovllm.cli import name_of
        from nanovllm.serve.api import create_app
        from nanovllm.serve.async_engine import AsyncEngine

        @asynccontextmanager
        async def lifespan(app):
            async with AsyncEngine(partial(LLM, model, **settings)) as engine:
                engine.on_death = partial(os._exit, 1)     # Ray starts another one
                app.mount("/", create_app(engine, name_of(model), hosts=["localhost", "127.0.0.1"]))
                yield

        return FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(serve.ingress(make_app)(), num_replicas=replicas,
                                  max_ongoing_requests=256,
                                  ray_actor_options={"num_cpus": 1, "num_gpus": gpus})
    serve.run(deployment.bind())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--model", help="a folder or a Hub id; default: the demo model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    args = parser.parse_args()
    start(args.replicas, args.model, args.port, args.gpus)
    print(f"{args.replicas} replicas on http://127.0.0.1:{args.port}/v1; Ctrl-C ends them")
    try:
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        from ray import serve
        serve.shutdown()


if __name__ == "__main__":
    main()
