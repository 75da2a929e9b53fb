"""Pictures by name: ranges, caching, and what is answered before, instead of and after a picture."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.endpoints.files import read_range
from serve_app.errors import JobError
from support.gateway import Server, as_base64, picture, wish


async def done(server: Server, **changes: object) -> str:
    return str((await server.post("controlnet", wish(**changes)))["output"][0])


async def test_a_picture_is_safe_to_show_and_to_cache(server: Server) -> None:
    url = await done(server)
    file = await server.get(url)
    assert file.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in file.headers["cache-control"]
    assert int(file.headers["content-length"]) == len(file.content)
    head = await server.http.head(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "etag"):
        assert head.headers[name] == file.headers[name]
    same = await server.get(url, **{"If-None-Match": file.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")


async def test_ranges(server: Server) -> None:
    url = await done(server)
    whole = (await server.get(url)).content
    size = len(whole)
    for sent, first, last in (
        ("bytes=0-9", 0, 9),
        ("bytes=10-", 10, size - 1),
        ("bytes=-5", size - 5, size - 1),
        (f"bytes=5-{size * 2}", 5, size - 1),
    ):
        part = await server.get(url, Range=sent)
        assert (part.status_code, part.content) == (206, whole[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    outside = await server.get(url, Range=f"bytes={size}-")
    assert (outside.status_code, outside.headers["content-range"]) == (416, f"bytes */{size}")
    for ignored in ("bytes=0-1,3-4", "bytes=-", "lines=0-1", "bytes=5-4"):
        assert (await server.get(url, Range=ignored)).content == whole
    etag = (await server.get(url)).headers["etag"]
    assert (await server.get(url, **{"Range": "bytes=0-1", "If-Range": etag})).status_code == 206
    assert (await server.get(url, **{"Range": "bytes=0-1", "If-Range": '"old"'})).status_code == 200


@given(st.integers(1, 1000), st.integers(0, 1200), st.integers(0, 1200))
def test_a_range_stays_inside(size: int, first: int, length: int) -> None:
    try:
        span = read_range(f"bytes={first}-{first + length}", size)
    except ValueError:
        assert first >= size
    else:
        assert span is not None
        assert span[0] == first <= span[1] < size


async def test_before_a_picture_exists(server: Server) -> None:
    server.backend.gate.clear()
    answer = await server.post("controlnet", wish(instant_response="yes"))
    early = await server.get(answer["future_links"][0])
    assert early.status_code == 404
    assert int(early.headers["retry-after"]) >= 1
    server.backend.gate.set()
    await server.file(answer["future_links"][0], 200)


async def test_after_a_failure_it_is_gone(server: Server) -> None:
    server.backend.failure = JobError("no")
    answer = await server.post("controlnet", wish())
    job = server.resources.jobs.get(answer["id"])
    assert job is not None
    gone = await server.get(f"/generations/{job.spec.output.file_name(0)}")
    assert (gone.status_code, gone.json()["message"]) == (410, "The job has ended without a picture: failed.")


async def test_a_deleted_picture_is_gone(server: Server) -> None:
    answer = await server.post("controlnet", wish())
    job = server.resources.jobs.get(answer["id"])
    assert job is not None
    assert job.result is not None
    server.resources.objects.delete(job.result.keys[0])
    assert (await server.get(answer["output"][0])).status_code == 410


async def test_an_unknown_name(server: Server) -> None:
    nobody = "00000000-0000-0000-0000-000000000000"
    for name in ("x.png", "../jobs.sqlite3", "%2e%2e/store-id", f"{nobody}-0.png", f"{nobody}-init_image", "a/b", ""):
        for folder in ("generations", "inputs"):
            answer = await server.get(f"/{folder}/{name}")
            assert answer.status_code == 404, name
            assert "retry-after" not in answer.headers


async def test_only_the_pictures_of_a_job_have_names(server: Server) -> None:
    url = await done(server, samples=2)
    assert (await server.get(url.replace("-0.png", "-1.png"))).status_code == 200
    assert (await server.get(url.replace("-0.png", "-2.png"))).status_code == 404


async def test_an_inline_input_has_a_name_while_its_job_runs(server: Server) -> None:
    server.backend.gate.clear()
    data = picture(40, 30)
    answer = await server.post("controlnet", wish(init_image=as_base64(data), instant_response="yes"))
    url = answer["meta"]["init_image"]
    stored = await server.get(url)
    assert (stored.status_code, stored.content) == (200, data)
    assert stored.headers["content-type"] == "image/png"
    assert (await server.get(url.replace("init_image", "mask_image"))).status_code == 404
    server.backend.gate.set()
    await server.status(answer["id"], "success")
    await server.file(url, 410)
