"""Clients of LibreTranslate as they are published, against a server of ours."""

import json
import shutil
import subprocess

import pytest

from tests.serving.conftest import sentence

pytestmark = pytest.mark.peers
TEXT = f"{sentence(1)} {sentence(2)}"


@pytest.fixture
def server(make_server):
    return make_server()


@pytest.fixture
def expected(served):
    return " ".join(served.translator.translate([sentence(1), sentence(2)], served.search, replace_unknown=True))


def test_libretranslatepy(server, expected):
    api = pytest.importorskip("libretranslatepy", reason="`make peers` installs libretranslatepy")
    client = api.LibreTranslateAPI(server.address)
    assert client.translate(TEXT, "en", "de") == expected
    assert [language["code"] for language in client.languages()] == ["en", "de"]
    assert client.detect(TEXT)[0]["language"] == "en"


def test_deep_translator(server, expected):
    deep = pytest.importorskip("deep_translator", reason="`make peers` installs deep-translator")
    client = deep.LibreTranslator(source="en", target="de", custom_url=f"{server.address}/", api_key="none")
    assert client.translate(TEXT) == expected


def test_argostranslate(server, expected):
    apis = pytest.importorskip("argostranslate.apis", reason="argostranslate, which needs PyTorch, is not installed")
    client = apis.LibreTranslateAPI(server.address)
    assert client.translate(TEXT, "en", "de") == expected
    assert [language["code"] for language in client.languages()] == ["en", "de"]
    assert client.detect(TEXT)[0]["language"] == "en"


def test_libretranslate_of_npm(server, expected, tmp_path):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "libretranslate@1.0.1"]
    try:
        done = subprocess.run(install, **options)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry did not answer in two minutes")
    if done.returncode:
        pytest.skip(f"npm could not install libretranslate: {done.stderr[-200:]}")
    (tmp_path / "ask.js").write_text(
        f"""
        const {{translate}} = require("libretranslate");
        const wanted = {{query: {json.dumps(TEXT)}, source: "en", target: "de", apiurl: "{server.address}"}};
        translate(wanted).then(console.log);
        """
    )
    done = subprocess.run(["node", "ask.js"], **options)
    assert done.stdout.removesuffix("\n") == expected, done.stderr
