"""The loopback Hub against the unmodified client: what the tests of publishing stand on."""

import os
from pathlib import Path

import pytest
from hubserver import LARGE, Fault, Hub, card_errors
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from qwlib.models.hub import transport_error

ME, OTHER = "hf_mine", "hf_theirs"
SMALL, BIG, HUGE = b"some text\n", os.urandom(LARGE + 5), os.urandom(3 * LARGE + 7)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", True
    )  # what the variable of that name sets when the client is imported
    with Hub(tmp_path / "hub", {ME: "me", OTHER: "other"}, multipart=2 * LARGE) as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.address, token=ME)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name, data in (("config.json", SMALL), ("a.safetensors", BIG), ("b.safetensors", HUGE)):
        (made / name).write_bytes(data)
    return made


def test_what_goes_up_comes_down(hub, api, folder, tmp_path):
    assert api.whoami()["name"] == "me"
    api.create_repo("me/model", private=True)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.repositories["me/model"].private
    assert {name: hub.content("me/model", name) for name in ("config.json", "a.safetensors", "b.safetensors")} == {
        "config.json": SMALL,
        "a.safetensors": BIG,
        "b.safetensors": HUGE,
    }
    ways = {path.split("/")[2] for method, path, _ in hub.seen if method == "PUT"}
    assert ways == {"object", "part"}  # basic, and in parts
    down = api.snapshot_download("me/model", cache_dir=tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == sorted(os.listdir(down))
    for path in folder.iterdir():
        assert (Path(down) / path.name).read_bytes() == path.read_bytes()
    entries = {entry.path: entry for entry in api.list_repo_tree("me/model")}
    assert entries["b.safetensors"].lfs.sha256 == hub.repositories["me/model"].files["b.safetensors"]
    assert entries["config.json"].lfs is None


def test_what_has_not_changed_is_not_sent_again(hub, api, folder):
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    sent, commits = hub.sent, len(hub.repositories["me/model"].commits)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert (hub.sent, len(hub.repositories["me/model"].commits)) == (sent, commits)
    (folder / "config.json").write_bytes(b"other text\n")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.sent == sent
    assert hub.content("me/model", "config.json") == b"other text\n"


def test_private_is_private_and_others_can_not_write(hub, api, folder):
    api.create_repo("me/secret", private=True)
    api.create_repo("me/open")
    for token in (OTHER, False):
        stranger = HfApi(endpoint=hub.address, token=token)
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("me/secret")
        assert stranger.model_info("me/open").id == "me/open"
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.address, token=OTHER).upload_folder(repo_id="me/open", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.address, token="hf_unknown").whoami()
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.address, token=OTHER).create_repo("me/mine")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/open")
    api.create_repo("me/open", exist_ok=True)
    assert not hub.repositories["me/open"].files


def test_content_that_is_damaged_on_its_way_is_not_taken(hub, api, folder):
    api.create_repo("me/model")
    hub.faults.append(Fault("PUT /lfs/object/", corrupt=True))
    with pytest.raises(RuntimeError, match=r"uploading 'a.safetensors'") as raised:
        api.upload_folder(repo_id="me/model", folder_path=folder)
    assert "does not have the checksum" in str(raised.value.__cause__)
    assert not hub.repositories["me/model"].files
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.content("me/model", "a.safetensors") == BIG


def test_faults_come_where_and_as_often_as_they_are_asked_for(hub, api, folder):
    api.create_repo("me/model")
    busy = {"Retry-After": "0"}
    hub.faults += [Fault("PUT /lfs/object/", status=500), Fault("PUT /lfs/part/", status=429, headers=busy, skip=1)]
    hub.faults.append(
        Fault("POST /api/models/me/model/commit", status=403, body=b'{"error": "Private storage quota exceeded"}')
    )
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    assert not any(fault.times for fault in hub.faults)  # the client tried again by itself after the first two
    assert not hub.repositories["me/model"].files
    sent = hub.sent
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.sent == sent  # the content had come
    assert sorted(hub.repositories["me/model"].files) == ["a.safetensors", "b.safetensors", "config.json"]


def test_a_connection_that_breaks(hub, api):
    api.create_repo("me/model")
    hub.faults.append(Fault("POST /api/models/me/model/commit", cut=True))
    added = [CommitOperationAdd("config.json", SMALL)]
    with pytest.raises(transport_error()):
        api.create_commit("me/model", added, commit_message="one")
    assert not hub.repositories["me/model"].files


def test_a_download_goes_on_where_it_broke_off(hub, api, tmp_path):
    api.create_repo("me/model")
    api.upload_file(repo_id="me/model", path_or_fileobj=BIG, path_in_repo="a.safetensors")
    address = f"{hub.address}/me/model/resolve/main/a.safetensors"
    bearer = {"Authorization": f"Bearer {ME}", "Range": f"bytes={LARGE}-"}
    rest = get_session().get(address, headers=bearer)
    assert (rest.status_code, rest.content) == (206, BIG[LARGE:])
    assert rest.headers["Content-Range"] == f"bytes {LARGE}-{len(BIG) - 1}/{len(BIG)}"
    got = api.hf_hub_download("me/model", "a.safetensors", local_dir=tmp_path / "local")
    assert Path(got).read_bytes() == BIG
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        api.hf_hub_download("me/model", "none.safetensors", local_dir=tmp_path / "local")


def card(**changes) -> str:
    result = EvalResult("text-generation", "text", "wikitext", "perplexity", 21.7, dataset_config="wikitext-2-raw-v1")
    data = {
        "license": "apache-2.0",
        "base_model": "a/b",
        "base_model_relation": "quantized",
        "library_name": "transformers",
    }
    data |= {"pipeline_tag": "text-generation", "tags": ["4-bit"], "model_name": "m", "eval_results": [result]}
    return f"---\n{ModelCardData(**(data | changes)).to_yaml()}\n---\n# A model\n"


BAD = {
    "a base model that is none": card(base_model="just a name"),
    "a relation that is none": card(base_model_relation="shrunk"),
    "a licence that is a list": card(license=["mit"]),
    "another licence without its name": card(license="other"),
    "tags that are one text": card().replace("tags:\n- 4-bit", "tags: 4-bit"),
    "no metric": card().replace("metrics:", "measures:"),
    "no data set": card().replace("dataset:", "data:"),
    "no task": card().replace("task:", "duty:"),
    "no YAML": "---\nlicense: [\n---\n",
    "a list": "---\n- license\n---\n",
}


@pytest.mark.parametrize("name", BAD)
def test_cards_that_the_hub_refuses(hub, api, name):
    assert card_errors(BAD[name])
    api.create_repo("me/model")
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        api.upload_file(repo_id="me/model", path_or_fileobj=BAD[name].encode(), path_in_repo="README.md")
    assert not hub.repositories["me/model"].files


def test_a_card_that_the_hub_takes(hub, api):
    assert card_errors(card()) == []
    api.create_repo("me/model")
    assert ModelCard(card()).data.base_model == "a/b"
    api.upload_file(repo_id="me/model", path_or_fileobj=card().encode(), path_in_repo="README.md")
    assert hub.content("me/model", "README.md").decode() == card()


def test_a_commit_that_names_content_which_never_came(hub, api):
    api.create_repo("me/model")
    lines = '{"key": "header", "value": {"summary": "x"}}\n'
    lines += '{"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "%s", "size": 3}}\n' % ("0" * 64)
    bearer = {"Authorization": f"Bearer {ME}"}
    answer = get_session().post(f"{hub.address}/api/models/me/model/commit/main", content=lines, headers=bearer)
    assert answer.status_code == 400
    assert "never came" in answer.json()["error"]
