"""The bill of materials: of the published schema, of what was packaged, and what is read of one."""

import json
import shutil
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packaging import house, made, packaged  # noqa: F401 - fixtures

from nnpassport.claims.claimfile import read_signed
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.files.disk import sha256_of
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError
from nnpassport.verification.cards import Declared, declared, declared_ancestors


@pytest.fixture
def base(house):  # noqa: F811
    """A network that the released one may have been made from, and one that is a stranger's."""
    rng = torch.Generator().manual_seed(0)
    state = load_file(house / "released" / "model.safetensors")
    for name, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=rng)
            state[name] = value + 0.1 * value.std().nan_to_num(0) * noise
    save_file(state, house / "base.safetensors")
    strange = {
        name: torch.randn(value.shape, generator=rng) if value.is_floating_point() else value
        for name, value in state.items()
    }
    save_file(strange, house / "stranger.safetensors")
    save_file({"lora.A": torch.ones(2, 3)}, house / "adapter.safetensors")
    return {"someone/base": house / "base.safetensors"}


def bill(house, **options):  # noqa: F811
    done = packaged(house, **options)
    return done, json.loads((house / "hub" / "bom.cdx.json").read_bytes())


def of(properties):
    return {each["name"].removeprefix("nnpassport:"): each["value"] for each in properties}


def test_the_bill_is_of_the_published_schema(house, base):  # noqa: F811
    """CycloneDX 1.6, as its own Python library ships it."""
    pytest.importorskip("cyclonedx.schema", reason="pip install cyclonedx-python-lib")
    jsonschema = pytest.importorskip("jsonschema")
    from referencing import Registry, Resource

    home = files("cyclonedx.schema._res")
    registry = Registry()
    for name in ("spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json"):
        resource = Resource.from_contents(json.loads((home / name).read_text("utf-8")))
        registry = registry.with_resource(f"http://cyclonedx.org/schema/{name}", resource)
    schema = json.loads((home / "bom-1.6.SNAPSHOT.schema.json").read_text("utf-8"))
    validator = jsonschema.Draft7Validator(schema, registry=registry)
    adapters = {"an adapter": house / "adapter.safetensors"}
    options = {"licence": "mit", "publish_claim": True, "bases": base, "adapters": adapters}
    _, document = bill(house, **options)
    assert [each.message for each in validator.iter_errors(document)] == []
    for spoiled in ({"version": 0}, {"serialNumber": "1"}, {"more": 1}):
        assert list(validator.iter_errors({**document, **spoiled}))
    document["metadata"]["component"]["type"] = "network"
    assert list(validator.iter_errors(document))


def test_the_bill_has_the_digests_of_what_was_packaged(house, base):  # noqa: F811
    adapters = {"an adapter": house / "adapter.safetensors"}
    done, document = bill(house, bases=base, adapters=adapters, publish_claim=True)
    network = document["metadata"]["component"]
    (weights,) = network["hashes"]
    assert weights["content"] == sha256_of(house / "hub" / "model.safetensors")
    said = of(network["properties"])
    claim = read_signed(house / "alice.claim.json")
    assert said["claim"] == done.claim == sha256_of(house / "alice.claim.json")
    assert said["tensors"] == done.weights
    assert said["claim:owner_key"] == claim.envelope.keyid
    hashed = {each["name"]: each["hashes"][0]["content"] for each in network["components"]}
    there = {path.name for path in (house / "hub").iterdir()}
    assert hashed.keys() == there - {"bom.cdx.json"}
    for name, digest in hashed.items():
        assert digest == sha256_of(house / "hub" / name)
    (adapter,) = document["components"]
    assert adapter["hashes"][0]["content"] == sha256_of(house / "adapter.safetensors")
    assert document["dependencies"] == [{"ref": "network", "dependsOn": ["adapter-0"]}]


def test_an_ancestor_has_what_compare_says_of_it(house, base):  # noqa: F811
    others = {**base, "no/ancestor": house / "stranger.safetensors"}
    done, document = bill(house, bases=others)
    assert done.bases == {"someone/base": "related", "no/ancestor": "none"}
    ancestors = document["metadata"]["component"]["pedigree"]["ancestors"]
    assert [of(each["properties"])["compare"] for each in ancestors] == ["related", "none"]
    first = of(ancestors[0]["properties"])
    assert first["tensors"] == tensors_digest(read_weights(base["someone/base"]).tensors)
    assert float(first["compare:log10_p"]) < -6
    assert ancestors[0]["hashes"][0]["content"] == sha256_of(base["someone/base"])
    assert 'base_model: ["someone/base", "no/ancestor"]' in (house / "hub/README.md").read_text()


def test_the_same_network_gives_the_same_bill(house, base):  # noqa: F811
    _, one = bill(house, bases=base)
    shutil.rmtree(house / "hub")
    _, other = bill(house, bases=base)
    assert one == other
    shutil.rmtree(house / "hub")
    _, another = bill(house)
    assert another["serialNumber"] != one["serialNumber"]
    assert "pedigree" not in another["metadata"]["component"]


def test_names_of_bases_are_names(house, base):  # noqa: F811
    (path,) = base.values()
    for names in (["\x1b"], [""], [str(n) for n in range(40)]):
        with pytest.raises(UnsuitableModelError):
            packaged(house, bases=dict.fromkeys(names, path))
    assert not (house / "hub").exists()


# What is read of one


def test_compare_holds_a_bill_against_what_is_found(house, base, call):  # noqa: F811
    packaged(house, bases=base)
    (path,) = base.values()
    code, out, _ = call("compare", house / "hub", path, "--card", "--json")
    card = json.loads(out)["card"]
    assert code == 0
    assert card["agrees"] is True
    assert [each["is_b"] for each in card["ancestors"]] == [True]
    assert "by its digest B is the ancestor someone/base" in card["says"]
    other = house / "stranger.safetensors"
    code, out, _ = call("compare", house / "hub", other, "--card", "--json")
    card = json.loads(out)["card"]
    assert code == 1
    assert card["agrees"] is False
    assert "no ancestor in A's bill of materials has a digest of B's files" in card["says"]
    (house / "hub" / "README.md").unlink()
    assert declared(house / "hub").names == ("someone/base",)


def test_a_folder_with_a_card_alone_declares_as_ever(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: a/b\n---\n")
    assert declared(tmp_path) == Declared(("a/b",), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bomFormat": "SPDX"}',
        '{"bomFormat": "CycloneDX", "metadata": []}',
        '{"bomFormat": "CycloneDX", "metadata": {"component": {"pedigree": {"ancestors": 1}}}}',
        '{"bomFormat": "CycloneDX", "metadata": {"component": {"pedigree": {"ancestors": [{}]}}}}',
        '{"bomFormat": "CycloneDX", "metadata": {"component": {"pedigree": '
        '{"ancestors": [{"name": "\\u001b"}]}}}}',
        '{"bomFormat": "CycloneDX", "metadata": {"component": {"pedigree": '
        '{"ancestors": [{"name": "a", "hashes": [{"alg": "SHA-256", "content": "x"}]}]}}}}',
        "[" * 100_000,
    ],
)
def test_a_bill_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "bom.cdx.json").write_text(text)
    with pytest.raises(UnreadableModelError):
        declared_ancestors(tmp_path)


def test_the_command_takes_names_and_folders(house, base, call):  # noqa: F811
    words = ("package", house / "released", "--claim", house / "alice.claim.json")
    assert call(*words, "-o", house / "hub", "--base", "no folder")[0] == 2
    ((name, path),) = base.items()
    code, out, _ = call(*words, "-o", house / "hub", "--base", f"{name}={path}", "--json")
    assert code == 0
    assert json.loads(out)["bases"] == {name: "related"}
