"""A bootstrap stops early at a setting that cannot work.

Once the tree exists, its own registry of variables decides.
"""

from tests.small.world import World


def test_name_that_the_pinned_tree_does_not_know_stops_as_soon_as_the_tree_is_there(
    world: World,
) -> None:
    world.layout.dotenv.write_text("VLLM_LOGING_LEVEL=DEBUG\n")
    ended = world.run("bootstrap")
    assert "VLLM_LOGING_LEVEL=DEBUG (.env)" in ended.error(2)
    assert "did you mean VLLM_LOGGING_LEVEL?" in ended.err
    assert (world.layout.vllm / "vllm" / "envs.py").exists()
    assert not world.layout.environment.exists()
    # Now before anything is looked for, and `inv env` says the same.
    again = world.run("bootstrap")
    assert "VLLM_LOGING_LEVEL=DEBUG (.env)" in again.error(2)
    assert "preflight" not in again.err
    row = next(
        line
        for line in world.run("env").out.splitlines()
        if line.split()[1:2] == ["VLLM_LOGING_LEVEL"]
    )
    assert row.startswith("FAIL")


def test_name_of_a_former_release_is_reported_and_stops_nothing(built: World) -> None:
    ended = built.bootstrap(env={"VLLM_USE_FLASHINFER_MXFP4_MOE": "1"})
    assert ended.err.count("is read by no release of vLLM") == 1
    assert "nothing to do" in ended.err


def test_environment_of_a_run_is_what_env_export_prints_and_run_gets(built: World) -> None:
    lines = built.run("env.export").out
    assert f"export VLLM_CACHE_ROOT={built.layout.jit}/" in lines
    assert f"export PATH={built.root}/scripts" in lines
    ended = built.run(
        "run",
        "--",
        "python",
        "-c",
        "import os, sys; print(sys.prefix, os.environ['VLLM_CACHE_ROOT']); sys.exit(9)",
    )
    assert ended.code == 9, ended.output
    prefix, cache = ended.out.split()
    assert prefix == str(built.layout.environment)
    assert f"VLLM_CACHE_ROOT={cache}\n" in lines
