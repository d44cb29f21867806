"""Neighbours against an edit distance of its own, one cell at a time."""

import numpy as np
import pytest

from aam.data.neighbours import BAND, CANDIDATES, NEAREST, Neighbours, bases_of

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def draw(generator, length):
    return "".join(generator.choice(list("ACGT"), length))


def substituted(generator, sequence, count):
    letters = list(sequence)
    for at in generator.choice(len(letters), count, replace=False):
        letters[at] = generator.choice([one for one in "ACGT" if one != letters[at]])
    return "".join(letters)


def edits(query, known):
    """Edit distance with free ends, at most ``BAND`` bases of either end overhanging."""
    rows, columns = len(query), len(known)
    cost = np.full((rows + 1, columns + 1), 10**6)
    cost[0, : BAND + 1] = cost[: BAND + 1, 0] = 0
    for i in range(1, rows + 1):
        for j in range(max(1, i - BAND), min(columns, i + BAND) + 1):
            match = cost[i - 1, j - 1] + (query[i - 1] != known[j - 1])
            cost[i, j] = min(cost[i, j], match, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    return min(cost[-1].min(), cost[:, -1].min())


def family(seed, length=60):
    """Six families of five relatives, at 0 to 10 substitutions from their ancestor."""
    generator = np.random.default_rng(seed)
    ancestors = [draw(generator, length) for _ in range(6)] * 5
    found = [substituted(generator, one, int(generator.integers(0, 11))) for one in ancestors]
    return generator, list(dict.fromkeys(found))


def letters_of(aligned):
    return "".join("-ACGT"[base] for base in aligned)


# ------------------------------------------------------------------------------------- distances
@pytest.mark.parametrize("seed", range(2))
def test_the_nearest_is_that_of_the_edit_distance(seed):
    generator, known = family(seed)
    chosen = generator.integers(0, len(known), 15)
    queries = [substituted(generator, known[at], int(generator.integers(1, 7))) for at in chosen]
    found = Neighbours(known).find(queries)
    for row, query in enumerate(queries):
        expected = np.array([edits(query, one) for one in known])
        held = found.index[row] >= 0
        own, at = found.distance[row][held], found.index[row][held]
        assert (np.diff(own) >= 0).all() and len(set(at)) == len(at)
        assert expected[at[0]] == expected.min()
        # Missing words add less than an edit.
        assert -1e-6 <= own[0] - expected[at[0]] <= 0.5
    assert not found.reverse.any() and not found.foreign.any()
    votes = np.exp(-found.distance[:, :NEAREST])
    np.testing.assert_allclose(found.weights, votes / votes.sum(axis=1, keepdims=True), rtol=1e-6)


def test_a_known_sequence_finds_itself_and_may_be_left_out():
    _, known = family(0)
    index, own = Neighbours(known), np.arange(len(known))
    found = index.find(known)
    assert np.array_equal(found.index[:, 0], own) and (found.distance[:, 0] == 0).all()
    assert np.array_equal(found.aligned, bases_of(known))
    some = index.find(known, leave_out=np.where(own % 2 == 0, own, -1))
    assert np.array_equal((some.index == own[:, None]).any(axis=1), own % 2 == 1)
    assert (some.distance[::2, 0] >= 1).all()


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        (lambda one: one[7:-9], 0, 0),
        (lambda one: "GATTACAG" + one + "CCCTA", 0, 0.01),
        (lambda one: one[:30] + one[33:], 1, 4.5),
        (lambda one: one[:30] + "GG" + one[30:], 1, 3.5),
        (lambda one: one[20:] + "TTGACCATTGGCAACGTACG", 0, 0.3),
        (lambda one: one.lower().replace("t", "u"), 0, 0),
    ],
)
def test_changed_sequences_find_their_source(change, least, most):
    generator = np.random.default_rng(1)
    known = [draw(generator, 100) for _ in range(60)]
    found = Neighbours(known).find([change(one) for one in known])
    assert np.array_equal(found.index[:, 0], np.arange(60))
    assert (found.distance[:, 0] >= least).all() and (found.distance[:, 0] <= most).all()
    assert not found.foreign.any() and not found.reverse.any()


def test_edits_of_a_short_overlap_count_over_the_whole_query():
    one = draw(np.random.default_rng(3), 80)
    wrong = one[20:30] + ("A" if one[30] != "A" else "C") + one[31:40]
    found = Neighbours([one[:40]]).find([one[20:40] + "A" * 40, wrong + "A" * 40])  # 40 overhang
    assert found.distance[0, 0] < 0.5
    assert 3 <= found.distance[1, 0] < 3.5  # one edit in 20 of 60 bases


# ------------------------------------------------------------------------------------- alignment
def test_bases_stand_at_the_places_of_the_nearest_known_sequence():
    generator = np.random.default_rng(2)
    known = [draw(generator, 50), draw(generator, 60)]
    one = known[0]
    other = "A" if one[20] != "A" else "C"
    inserted = next(base for base in "ACGT" if base not in (one[24], one[25]))
    gone = next(at for at in range(24, 30) if one[at] != one[at - 1] and one[at] != one[at + 1])
    cases = {
        one: one,
        one[:20] + other + one[21:]: one[:20] + other + one[21:],
        one[:gone] + one[gone + 1 :]: one[:gone] + "-" + one[gone + 1 :],
        one[:25] + inserted + one[25:]: one,
        one[6:]: "-" * 6 + one[6:],
        one[:-6]: one[:-6] + "-" * 6,
        "ACGTAG" + one: one,
        one + "ACGTAG": one,
        one[:30].lower() + "N" + one[31:]: one[:30] + "-" + one[31:],
    }
    found = Neighbours(known).find(list(cases))
    assert (found.index[:, 0] == 0).all()
    expected = [f"{case}{'-' * 10}" for case in cases.values()]
    assert [letters_of(row) for row in found.aligned] == expected


@pytest.mark.parametrize("seed", range(2))
def test_aligned_bases_come_from_the_query_in_order(seed):
    """With any edits: what is left out are at most the insertions, the rest keeps its order."""
    generator, known = family(seed, length=80)
    queries = []
    for row in generator.integers(0, len(known), 30):
        letters = list(substituted(generator, known[row], 3))
        for _ in range(2):
            letters.insert(int(generator.integers(0, len(letters))), draw(generator, 1))
            del letters[int(generator.integers(0, len(letters)))]
        queries.append("".join(letters))
    found = Neighbours(known).find(queries)
    rows = zip(queries, found.aligned, found.index[:, 0], found.distance[:, 0], strict=True)
    for query, row, near, distance in rows:
        rest, kept = iter(query), letters_of(row).replace("-", "")
        assert all(letter in rest for letter in kept)  # a subsequence
        same = sum(a == b for a, b in zip(letters_of(row), known[near], strict=True))
        assert same >= len(kept) - distance - 0.5 and len(kept) >= len(query) - distance - 5


# --------------------------------------------------------------- other strands, regions, odd inputs
def test_reverse_complements_are_recognised_and_other_dna_is_foreign():
    generator, known = family(4, length=100)
    queries = [substituted(generator, one, 3) for one in known]
    turned = [one.translate(COMPLEMENT)[::-1] for one in queries]
    turned[0] = turned[0][5:]
    other = [draw(generator, 100) for _ in range(200)]  # shares hardly a word with any
    found = Neighbours(known).find(turned + queries + other)
    assert np.array_equal(found.reverse, np.arange(len(found.reverse)) < len(turned))
    assert not found.foreign[:-200].any() and found.foreign[-200:].mean() > 0.99


def test_few_known_sequences_of_all_lengths_and_queries_without_a_word():
    one = Neighbours(["ACGTTGCAAGTCCATG"])
    found = one.find(["ACGTTGCAAGTCCATC", "TTTTTTTTTTTTTTTT", "ACGTTGC", "", "NNNNNNNNNNNN"])
    assert found.index.tolist() == [[0], *[[-1]] * 4] and 1 <= found.distance[0, 0] <= 1.5
    assert np.isinf(found.distance[1:]).all() and found.foreign.tolist() == [False, *[True] * 4]
    assert (found.aligned[1:] == 0).all() and (found.weights[1:] == 0).all()
    none = one.find([])
    assert none.index.shape == (0, 1) and none.aligned.shape == (0, 16) and len(none.weights) == 0
    generator, lengths = np.random.default_rng(6), [5, 9, 20, 60, 100, 150]
    known = [draw(generator, length) for length in lengths]
    found = Neighbours(known).find(known)
    assert found.index[:, 0].tolist() == [-1, 1, 2, 3, 4, 5]  # five bases are no word
    assert [letters_of(row).rstrip("-") for row in found.aligned[1:]] == known[1:]


def test_neither_the_order_of_queries_nor_their_blocks_change_anything(monkeypatch):
    generator, known = family(8)
    queries = [substituted(generator, one, 4)[generator.integers(0, 9) :] for one in known]
    order = generator.permutation(len(queries))
    whole = Neighbours(known).find(queries).take(order)
    for name, size in (("PAIRS", 3 * CANDIDATES), ("ALIGNED", 4), ("SEQUENCES", 5)):
        monkeypatch.setattr(f"aam.data.neighbours._BLOCK_{name}", size)
    parts = Neighbours(known).find([queries[at] for at in order])
    for name in ("distance", "aligned", "reverse", "foreign"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name


def test_a_quarter_of_the_words_finds_the_same_nearest(monkeypatch):
    generator = np.random.default_rng(5)
    known = [draw(generator, 120) for _ in range(200)]
    whole = Neighbours(known)
    monkeypatch.setattr("aam.data.neighbours.MOST_INDEXED_WHOLE", 100)
    part = Neighbours(known)
    assert 0.15 < len(part._holders) / len(whole._holders) < 0.35
    found = part.find([one[:50] + "A" + one[51:] for one in known[:40]])
    assert found.index[:, 0].tolist() == list(range(40)) and found.index.shape[1] == CANDIDATES
    assert found.weights.shape == (40, NEAREST)
