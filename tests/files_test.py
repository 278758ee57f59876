"""Files are there whole or not at all, whoever writes them."""

from concurrent import futures

from audiomosaic_jax import files


def test_writers_of_one_file_do_not_meet(tmp_path):
  path = tmp_path / "about.json"
  texts = [str(i) * 10_000 for i in range(8)]
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda text: files.write_text(path, text), texts * 20))
  assert path.read_text() in texts
  assert [p.name for p in tmp_path.iterdir()] == ["about.json"]
