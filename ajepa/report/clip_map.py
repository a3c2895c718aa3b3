"""Held-out clips on a run's page: a map of them by similarity, and some of them with their nearest neighbours."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ajepa.report.charts import mel_data_url
from ajepa.report.model_outputs import PageData
from pipeline.report.html import Markup, html_tag, join_markup
from pipeline.report.players import SoundPlayers, optional_player
from pipeline.report.spectrograms import colour_range, read_log_mel

MIN_MAP_CLIPS = 5

MAX_PERPLEXITY = 30  # of t-SNE

QUERY_CLIPS = 6

NEIGHBOURS_PER_QUERY = 5

MAP_SIDE = 340.0

MAP_MARGIN = 8

DOT_RADIUS = 3.4

HUES = 7  # colours of the page that can be told apart, also by people who see no red or green

GROUPS = 2 * HUES  # labels with a mark of their own: every hue as a circle and as a square


def clip_map_section(page_data: PageData) -> Markup:
    """Return a t-SNE map of the clips, marked by label; clips with similar vectors are close to each other."""
    from sklearn.manifold import TSNE  # imported late: takes more than a second, and pictures do not need it

    count = len(page_data.rows_N)
    if count < MIN_MAP_CLIPS:
        return html_tag("p", f"{count} eval clips are too few for a map.", class_="warn")

    # t-SNE needs three times as many points as its perplexity.
    tsne = TSNE(perplexity=min(MAX_PERPLEXITY, (count - 1) / 3), init="pca", random_state=0)
    position_N2 = tsne.fit_transform(page_data.features_ND)
    group_N, names = common_label_groups(page_data)

    # A small spectrogram and a title for each clip.
    mel_BTF = read_log_mel(page_data.store, page_data.rows_N)
    span = colour_range(mel_BTF)
    mels = [mel_data_url(mel_TF, span) for mel_TF in mel_BTF]
    rows = page_data.rows_N.tolist()
    titles = [f"{page_data.clip_title(row)} · {page_data.clip_id(row)}" for row in rows]

    note = (
        f"{count} clips of the eval splits, placed by t-SNE of the {page_data.vector_description}. "
        "Point at a clip to see it, at a label to see its clips. Of several labels, the commonest marks a clip."
    )
    chart = clip_map_chart(position_N2, group_N, titles, mels)
    return join_markup(html_tag("p", note, class_="soft"), group_legend(names, group_N), chart)


def common_label_groups(page_data: PageData) -> tuple[np.ndarray, list[str]]:
    """Return the group of each clip and the names of the groups; a group is one of the most frequent labels.

    A clip belongs to its most frequent label; its group is -1 if it has none of these labels.
    """
    # Raw labels, because propagated labels would put most clips under a few roots of the tree.
    labels_of_clips = [page_data.labels["raw"][row].to_list() for row in page_data.rows_N.tolist()]
    label_counts = Counter(label for labels in labels_of_clips for label in labels)
    common_labels = [label for label, _ in label_counts.most_common(GROUPS)]
    place_of_label = {label: place for place, label in enumerate(common_labels)}
    group_N = [
        min((place_of_label[label] for label in labels if label in place_of_label), default=-1)
        for labels in labels_of_clips
    ]
    return np.array(group_N), [page_data.store.classes.names[label] for label in common_labels]


def group_legend(names: Sequence[str], group_N: np.ndarray) -> Markup:
    """Every group with its mark and the number of its clips; pointing at one shows its clips alone."""
    entries = [(group, name) for group, name in enumerate(names) if (group_N == group).any()]
    if (group_N < 0).any():
        entries.append((-1, "none of these"))
    keys = (
        html_tag(
            "button",
            html_tag("svg", group_mark(group, 5, 5, 4.2), viewBox="0 0 10 10", aria_hidden="true"),
            f"{name} ",
            html_tag("span", int((group_N == group).sum()), class_="soft"),
            type="button",
            data_group=group,
        )
        for group, name in entries
    )
    return html_tag("p", *keys, class_="keys", data_groups="")


def group_mark(group: int, x: float, y: float, radius: float, *inner: object, **attributes: object) -> Markup:
    """The mark of a group: a circle or a square of its hue; grey for clips of no group."""
    css_class = "dot" if group < 0 else f"dot hue{group % HUES}"
    if 0 <= group < HUES or group < 0:
        return html_tag("circle", *inner, cx=x, cy=y, r=radius, class_=css_class, **attributes)
    half = 0.89 * radius  # the same area as the circle's
    corner = {"x": x - half, "y": y - half}
    return html_tag("rect", *inner, **corner, width=2 * half, height=2 * half, class_=css_class, **attributes)


def clip_map_chart(
    position_N2: np.ndarray, group_N: np.ndarray, titles: Sequence[str], mels: Sequence[str]
) -> Markup:
    """Return a map of clips as marks; pointing at a mark shows the title and the spectrogram of its clip.

    group_N  group of each clip, which decides its mark; -1: no group
    titles   title of each clip
    mels     spectrogram of each clip, as a data URL
    """
    # The positions in the units of the view box.
    low_2 = position_N2.min(0)
    high_2 = position_N2.max(0)
    share_N2 = (position_N2 - low_2) / np.maximum(high_2 - low_2, 1e-9)
    place_N2 = MAP_MARGIN + share_N2 * (MAP_SIDE - 2 * MAP_MARGIN)

    # The marks, grey ones below; each has the title and the spectrogram of its clip as attributes.
    order = np.argsort(group_N >= 0, kind="stable").tolist()
    dots = [
        group_mark(
            int(group_N[clip]),
            *place_N2[clip].tolist(),
            DOT_RADIUS,
            html_tag("title", titles[clip]),
            data_mel=mels[clip],
            data_group=int(group_N[clip]),
            tabindex=0,
        )
        for clip in order
    ]
    box = f"0 0 {MAP_SIDE:g} {MAP_SIDE:g}"
    chart = html_tag("svg", *dots, viewBox=box, role="img", aria_label="map of clips", class_="map")

    # The page's script fills the output element when the pointer is on a mark.
    pointed_at = html_tag("output", class_="shown")
    return html_tag("div", chart, pointed_at, class_="mapped")


def neighbours_section(page_data: PageData, players: SoundPlayers | None) -> Markup:
    """Return some clips, each with its nearest neighbours by the cosine of the standardised vectors."""
    # Vectors of length 1, so that their products are cosines.
    norm_N1 = np.linalg.norm(page_data.features_ND, axis=1, keepdims=True)
    unit_ND = page_data.features_ND / np.maximum(norm_N1, 1e-9)
    cosine_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(cosine_NN, -np.inf)
    neighbour_count = min(NEIGHBOURS_PER_QUERY, len(cosine_NN) - 1)
    nearest_NK = np.argsort(-cosine_NN, axis=1, kind="stable")[:, :neighbour_count]

    # How often neighbours share a label, and any two clips.
    shares_NN = shared_label_matrix(page_data)
    parts = []
    if neighbour_count and shares_NN.any():
        among_nearest = np.take_along_axis(shares_NN, nearest_NK, axis=1).mean()
        count = len(shares_NN)
        among_all = shares_NN.sum() / (count * (count - 1))
        note = (
            f"Of the {neighbour_count} nearest neighbours of a clip, {among_nearest:.0%} share a label with it; "
            f"of any two clips, {among_all:.0%} do. A green edge marks a shared label."
        )
        parts.append(html_tag("p", note, class_="soft"))

    # The query clips, spread evenly over the clips of the page.
    query_places = np.linspace(0, len(cosine_NN) - 1, min(QUERY_CLIPS, len(cosine_NN))).astype(int)
    rows = [
        neighbours_row(
            page_data, query, nearest_NK[query].tolist(), cosine_NN[query], shares_NN[query], players
        )
        for query in query_places.tolist()
    ]
    return join_markup(*parts, html_tag("div", *rows, class_="scroll"))


def shared_label_matrix(page_data: PageData) -> np.ndarray:
    """Return which clips of the page share a raw label, bool `NN`, without the diagonal."""
    labels_NC = page_data.store.labels_BC(page_data.rows_N, "raw") > 0
    shares_NN = (labels_NC.astype(np.float32) @ labels_NC.T.astype(np.float32)) > 0
    np.fill_diagonal(shares_NN, False)
    return shares_NN


def neighbours_row(
    page_data: PageData,
    query: int,
    nearest: list[int],
    cosine_N: np.ndarray,
    shares_N: np.ndarray,
    players: SoundPlayers | None,
) -> Markup:
    """Return a row of the page: the clip with index `query` among the page's clips, then its nearest neighbours."""
    # The spectrograms; the whole row has one range of colours.
    places = [query, *nearest]
    mel_BTF = read_log_mel(page_data.store, page_data.rows_N[places])
    span = colour_range(mel_BTF)
    cells = []
    for place, mel_TF in zip(places, mel_BTF, strict=True):
        row = int(page_data.rows_N[place])
        clip_id = page_data.clip_id(row)
        cell = html_tag(
            "div",
            html_tag("img", src=mel_data_url(mel_TF, span), alt="log mel"),
            html_tag("span", "this clip" if place == query else f"{cosine_N[place]:.2f}", class_="soft"),
            html_tag("span", page_data.clip_title(row)),
            html_tag("span", clip_id, class_="id", title=clip_id),
            optional_player(players, row),
            class_="alike same" if shares_N[place] else "alike",
        )
        cells.append(cell)
    return html_tag("div", *cells, class_="row")
