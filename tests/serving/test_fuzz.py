"""Every route of the API's description, with values by chance: what comes back is what the description promises."""

import os
import random
from urllib.parse import quote

import jsonschema
import pytest

from tests.serving.conftest import write_tone

ROUNDS = int(os.environ.get("HFVLM_FUZZ", "60")) // 2
TEXTS = (
    "", "a", "a red circle", "a::2", "::", "a::nan", "a::1e400", "image", "audio", "0", "-1", "5", "1e3", "1" * 20,
    "1", "null", "None", "true", "\0", "\ud7ff\U0001f600", "x" * 9_999, "../../etc/passwd", "file:///etc/passwd", "http://localhost/",
    "data:image/png;base64,AAAA", "<image>", "</s><s>", "{}", "%00%2e%2e", "single", "imagenet-7", "'; --", " ",
)  # fmt: skip


@pytest.fixture(scope="module")
def api(client):
    return client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def contents(red_circle, tmp_path_factory):
    tone = tmp_path_factory.mktemp("fuzz") / "tone.wav"
    write_tone(tone, 440, seconds=0.5)
    others = [b"", b"\x93NUMPY", b"a,b\n1,2\n", random.Random(2).randbytes(200)]
    return {"image": red_circle, "audio": tone.read_bytes()} | dict(enumerate(others))


def resolved(schema, api):
    """A schema without references."""
    if "$ref" in schema:
        return resolved(api["components"]["schemas"][schema["$ref"].rpartition("/")[2]], api)
    return schema


def file_of(name, chance, contents):
    """A file of the field's kind, or of another one, mostly damaged."""
    own = contents.get(name)
    if own is not None and chance.random() < 0.5:
        return own
    data = bytearray(chance.choice(list(contents.values())))
    for _ in range(chance.choice((0, 0, 1, 20)) if data else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data) + 1)))])


def value_of(name, schema, chance, contents, api):
    """A file's (name, content) or a text: mostly what the schema wants, now and then anything."""
    schema = resolved(schema, api)
    if "anyOf" in schema:
        schema = resolved(chance.choice(schema["anyOf"]), api)
    if chance.random() < 0.15:
        return chance.choice(TEXTS) if chance.random() < 0.7 else ("a.bin", file_of(name, chance, contents))
    if "contentMediaType" in schema or schema.get("format") == "binary":
        return chance.choice(("a.png", "../b.wav", "c", 'd".npy')), file_of(name, chance, contents)
    if "enum" in schema:
        return chance.choice(schema["enum"])
    if schema.get("type") == "integer":
        return str(chance.randint(int(schema.get("minimum", 0)), min(20, int(schema.get("maximum", 20)))))
    if schema.get("type") == "number":
        return str(chance.uniform(schema.get("minimum", 0), schema.get("maximum", 1)))
    return chance.choice(TEXTS)


def form_of(schema, chance, contents, api):
    """Fields and files of a form."""
    schema = resolved(schema, api)
    fields, files = {}, []
    names = [name for name in schema["properties"] if name in schema.get("required", ()) or chance.random() < 0.2]
    names += ["other"] if chance.random() < 0.1 else []
    for name in names:
        about = resolved(schema["properties"].get(name, {"type": "string"}), api)
        several = about.get("type") == "array"
        for _ in range(chance.randint(0, 3) if several else chance.choice((1, 1, 1, 1, 2))):
            found = value_of(name, about["items"] if several else about, chance, contents, api)
            if isinstance(found, tuple):
                files.append((name, found))
            else:
                fields.setdefault(name, []).append(found)
    if "max_new_tokens" in schema["properties"]:
        fields["max_new_tokens"] = [str(chance.choice((0, 1, 3)))]
    return fields, files


def check(answer, operation, api, about):
    """The status is one of the description's, and the body fits it."""
    assert str(answer.status_code) in operation["responses"], (about, answer.status_code, answer.text)
    kinds = operation["responses"][str(answer.status_code)].get("content", {})
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in kinds or f"{kind.partition('/')[0]}/*" in kinds, (about, kind)
    if kind == "application/json":
        schema = kinds[kind]["schema"] | {"components": api["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())
    if answer.status_code >= 400:
        assert len(answer.json()["error"]) > 10, about


def test_forms_by_chance(client, api, contents):
    chance = random.Random(0)
    seen = set()
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            for _ in range(ROUNDS if method == "post" else 0):
                ((kind, about),) = operation["requestBody"]["content"].items()
                fields, files = form_of(about["schema"], chance, contents, api)
                if kind == "multipart/form-data" and not files and chance.random() < 0.5:
                    files = [("text", (None, "a"))] if path != "/chat" else []
                answer = client.post(path, data=fields, files=files or None)
                check(answer, operation, api, (path, fields, [name for name, _ in files]))
                seen.add((path, answer.status_code))
    assert {(path, 200) for path in ("/embed", "/search", "/classify", "/chat")} <= seen
    assert {(path, 422) for path in ("/embed", "/search", "/classify", "/chat")} <= seen


def test_paths_by_chance(client, api):
    chance = random.Random(1)
    seen = set()
    for path, methods in api["paths"].items():
        if "get" not in methods:
            continue
        for _ in range(ROUNDS if "{" in path else 1):
            values = {
                "modality": chance.choice([*["image", "audio"] * len(TEXTS), *TEXTS]),
                "row": chance.choice([*["0", "2", "7"] * len(TEXTS), *TEXTS]),
            }
            filled = path.format(**{name: quote(value[:500], safe="") for name, value in values.items()})
            answer = client.get(filled)
            if answer.status_code != 404:
                check(answer, methods["get"], api, filled)
            seen.add((path, answer.status_code))
    assert {("/about", 200), ("/media/{modality}/{row}", 200), ("/thumbnail/{modality}/{row}", 422)} <= seen


def test_the_description_is_whole(api):
    assert set(api["paths"]) == {
        "/about", "/embed", "/search", "/classify", "/chat", "/thumbnail/{modality}/{row}", "/media/{modality}/{row}"
    }  # fmt: skip
    for path, methods in api["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            assert {"200", "403", "422"} <= set(operation["responses"]), path
            problem = operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
            assert problem.endswith("/Problem")
