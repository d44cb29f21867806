"""The demo from simulated files to a report, with a few steps only."""

from aam import train


def test_the_demo_replaces_an_earlier_one_and_nothing_else(tmp_path, capsys):
    words = ["demo", "--samples", "24", "--pretrain-epochs", "1", "--finetune-steps", "2"]
    folder = tmp_path / "demo"
    (folder / "simulated").mkdir(parents=True)
    (folder / "predicted-age.tsv").write_text("of an earlier demo")
    assert train.main([*words, "--output-dir", str(folder), "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Mantel r" in printed and "masked-nucleotide accuracy" in printed
    assert "age R2" in printed and "random forest" in printed
    assert (folder / "pretrained" / "report.html").is_file()
    lines = (folder / "predicted-age.tsv").read_text().splitlines()
    assert lines[0] == "sample-id\tpredicted" and len(lines) == 25
    assert "clade memberships" in printed and "placement" in printed
    assert all(-50 < float(line.split("\t")[1]) < 150 for line in lines[1:])

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert train.main([*words, "--output-dir", str(other)]) == 2
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "years of work"

    (tmp_path / "file").write_text("")
    assert train.main(["demo", "--output-dir", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
