"""`gte-export triton` and `gte-export check`, and the flat forms of both."""

import json
import shutil
from pathlib import Path

import pytest

from gte_deploy.bundle.signing import sign_bundle
from gte_deploy.core.exit_codes import FAILURE, OK, USAGE
from gte_deploy.exporters import cli
from gte_deploy.exporters.triton import repository
from gte_deploy.models import builtin_path


def test_a_repository_of_a_bundle(bundles, tmp_path, capsys):
    assert (
        cli.main(
            ["--format", "triton", str(bundles["embed"]), str(tmp_path / "r"), "--max-queue-size", "9", "--progress"]
        )
        == OK
    )
    out, err = capsys.readouterr()
    assert out.startswith(f"repository {tmp_path / 'r'} (") and "models to request: gte_embed, gte_embed_fast" in out
    assert "gte-export: check the configurations" in err
    assert "max_queue_size: 9" in (tmp_path / "r" / "gte_encoder" / "config.pbtxt").read_text()


def test_json(bundles, tmp_path, capsys):
    arguments = ["--format", "triton", "-m", str(bundles["classify"]), "-o", str(tmp_path / "r"), "--json", "--quiet"]
    assert cli.main(arguments) == OK
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert {"gte_embed", "gte_embed_ids", "gte_rerank", "gte_rerank_ids"} < set(result["ensembles"])
    assert result["checked"] is True
    assert err == ""


def test_only_a_signed_bundle_is_served_where_a_trusted_key_is_given(bundles, tmp_path, capsys):
    from keys import new_keys

    keys = new_keys()
    (tmp_path / "public.pem").write_bytes(keys.public)
    bundle = shutil.copytree(bundles["embed"], tmp_path / "bundle")
    ask = ["--format", "triton", "--trusted-key", str(tmp_path / "public.pem"), "-o", str(tmp_path / "r"), "-m"]
    assert cli.main([*ask, str(bundle)]) == FAILURE
    assert "is not signed: it has no manifest.json.sig" in capsys.readouterr().err
    assert cli.main([*ask, str(builtin_path())]) == FAILURE
    assert "is not signed: only bundles are" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    sign_bundle(bundle, keys.private)
    assert cli.main([*ask, str(bundle)]) == OK
    assert not list((tmp_path / "r").rglob("*.sig")), "the signature is of the bundle's manifest alone"


def test_every_option_reaches_the_export(monkeypatch):
    calls = []
    monkeypatch.setattr(repository, "export_repository", lambda *args, **options: calls.append((args, options)))
    line = "model out --format triton --precision int8 --max-len 64 --max-batch-size 4 --max-queue-size 5 --threads 3"
    line += " --queue-timeout 0.5 --response-cache --model-version 2 --accelerator cuda --force --quiet"
    line += " --trusted-key old.pem --trusted-key new.pem"
    monkeypatch.setattr(cli, "_result_text", str)
    assert cli.main(line.split()) == OK
    assert calls == [
        (
            ("model", "out"),
            {
                "precision": "int8",
                "max_length": 64,
                "max_batch_size": 4,
                "max_queue_size": 5,
                "threads": 3,
                "queue_timeout_s": 0.5,
                "response_cache": True,
                "model_version": 2,
                "accelerator": "cuda",
                "trusted_keys": ("old.pem", "new.pem"),
                "force": True,
                "progress": None,
            },
        )
    ]


def test_with_an_engine_the_one_argument_is_the_output(monkeypatch):
    calls = []
    monkeypatch.setattr(
        repository, "export_repository", lambda *args, **options: calls.append((args, options["engine"]))
    )
    monkeypatch.setattr(cli, "_result_text", str)
    for words in ("--engine plan out", "--engine plan -o out", "--engine plan model out"):
        assert cli.main(["triton", *words.split()]) == OK
    assert calls == [((None, "out"), Path("plan"))] * 2 + [(("model", "out"), Path("plan"))]


def test_the_tensorrt_accelerator_is_refused_with_its_replacement(bundles, tmp_path, capsys):
    arguments = ["--format", "triton", str(bundles["embed"]), str(tmp_path / "r"), "--accelerator", "tensorrt"]
    assert cli.main(arguments) == USAGE
    assert "serve it with gte-export --format triton --engine BUNDLE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--engine=x", "--max-batch-size=3", "--response-cache", "--threads=1"])
def test_options_for_triton_alone(option, capsys):
    assert cli.main(["model", option]) == USAGE
    assert f"{option.partition('=')[0]} is for --format triton" in capsys.readouterr().err


def test_checking(repositories, tmp_path, capsys):
    path = repositories["embed"]
    assert cli.main(["check", str(path)]) == OK
    assert cli.main(["--check-repository", str(path)]) == OK
    assert "no problem was found" in capsys.readouterr().out
    (tmp_path / "gte_encoder").mkdir()
    (tmp_path / "gte_encoder" / "config.pbtxt").write_text('name: "encoder"')
    assert cli.main(["--check-repository", str(tmp_path), "--json"]) == FAILURE
    assert "'encoder' is not that of the folder" in json.loads(capsys.readouterr().out)["problems"][0]
    assert cli.main(["--check-repository", str(tmp_path / "gte_encoder")]) == USAGE
