"""Draw a synthetic data set of leaf pictures: healthy ones and four plant diseases.

    python data_samples/leaves.py [--seed 0] [--per-class 120] [--out data_samples/leaves.zip]

A leaf is drawn flat and upright (outline, colour, veins, sign of the disease), then laid with a random pose
on a random background, lit, blurred, reduced to 64x64 and saved as JPEG. All that varies besides the disease
(species, colour, light, background, holes, drops of water) varies alike in every class, so that neither
a colour nor a place in the picture gives the class away: one has to see the sign.

Each picture has a random generator of its own, and the zip has fixed dates and order: the same seed gives
the same bytes. Colours are RGB from 0 to 1, in float64, so that rounding to 8 bits hides what CPUs do differently.
"""

import argparse
import zipfile

import cv2
import numpy as np

SIZE = 64  # side of the saved pictures, pixels
N = 256  # side while drawing: 4 times more, so that reducing it smooths the edges
Y, X = np.mgrid[:N, :N].astype(float)  # every pixel's row and column
CLASSES = ["healthy", "rust", "leaf_spot", "mildew", "blight"]
SHAPES = {  # half width (of the leaf's length), then the powers of t and 1 - t: the base and the tip, small = round
    "ovate": (0.30, 0.50, 0.85),
    "lanceolate": (0.19, 0.60, 0.90),
    "lobed": (0.33, 0.80, 0.45),
    "serrated": (0.29, 0.45, 0.80),
}
GREENS = np.array([[0.12, 0.31, 0.12], [0.21, 0.45, 0.14], [0.36, 0.56, 0.17], [0.60, 0.66, 0.22]])  # dark to yellow


def noise(rng, cells, octaves=1):
    """Smooth noise in about -1..1: a random grid of cells x cells, enlarged; each octave is finer and fainter."""
    return sum(
        cv2.resize(rng.uniform(-1, 1, (cells << i, cells << i)), (N, N), interpolation=cv2.INTER_CUBIC) / 2**i
        for i in range(octaves)
    )


def mix(a, b, alpha):
    """Lay colour or picture b over a, with opacity alpha (N x N)."""
    return a + (np.asarray(b) - a) * np.clip(alpha, 0, 1)[..., None]


def blur(x, sigma):
    return cv2.GaussianBlur(x, (0, 0), sigma)


def discs(points, radii):
    """A mask of filled circles (1 inside)."""
    mask = np.zeros((N, N))
    for (x, y), r in zip(points, radii):
        cv2.circle(mask, (int(x), int(y)), max(1, round(r)), 1.0, -1)
    return mask


def places(rng, mask, n):
    """n random points (x, y) where the mask is 1."""
    yx = np.argwhere(mask > 0.5)
    return yx[rng.integers(len(yx), size=n)][:, ::-1]


def distance(point):
    """The distance of every pixel to a point (x, y)."""
    return np.hypot(X - point[0], Y - point[1])


def healthy(rng, leaf, blade, tip, severity):
    """No sign. The signs take the leaf's colours, its blade (a mask), its tip and a severity from 0 to 1."""
    return leaf


def rust(rng, leaf, blade, tip, severity):
    """Small raised orange-brown pustules in clusters, in a faint yellow patch."""
    centres = places(rng, blade, rng.integers(2, 5))
    n = int(22 + 85 * severity)
    points = centres[rng.integers(len(centres), size=n)] + rng.normal(0, 13 + 12 * severity, (n, 2))
    radii = rng.uniform(2.4, 4.8, n)  # about half a pixel to a pixel once reduced
    leaf = mix(leaf, [0.72, 0.66, 0.20], 0.5 * blur(discs(points, radii + 3), 5))
    leaf = mix(leaf, [0.36, 0.15, 0.04], 0.8 * blur(discs(points + 1, radii + 0.8), 1))  # the rim, in shadow
    return mix(leaf, np.array([0.70, 0.33, 0.08]) * rng.uniform(0.8, 1.1), blur(discs(points, radii), 0.8))


def leaf_spot(rng, leaf, blade, tip, severity):
    """Few round brown spots with a paler, dry centre, a dark ring and a yellow halo."""
    n = int(3 + 8 * severity)
    points, radii = places(rng, blade, n), rng.uniform(6, 10 + 5 * severity, n)
    leaf = mix(leaf, [0.82, 0.76, 0.26], rng.uniform(0.6, 0.9) * blur(discs(points, radii * 1.7), 4))
    leaf = mix(leaf, [0.29, 0.17, 0.08], blur(discs(points, radii), 1.5))
    return mix(leaf, np.array([0.58, 0.43, 0.28]) * rng.uniform(0.7, 1.2), 0.9 * blur(discs(points, radii * 0.5), 2.5))


def mildew(rng, leaf, blade, tip, severity):
    """White-grey powder in diffuse patches, denser in their middle."""
    n = int(3 + 5 * severity)
    powder = sum(np.exp(-((distance(p) / rng.uniform(14, 26)) ** 2)) for p in places(rng, blade, n))
    powder = np.clip(1.3 * powder + 0.5 * noise(rng, 16, 2) * (powder > 0.05) - 0.15, 0, 1)
    grain = 0.8 + 0.3 * noise(rng, 100)
    return mix(leaf, [0.88, 0.89, 0.86], powder * grain * (0.65 + 0.30 * severity))


def blight(rng, leaf, blade, tip, severity):
    """A large dead brown area that grows from the tip or from the edge, zoned, with a yellow front."""
    edge = places(rng, blade - cv2.erode(blade, np.ones((5, 5))), 1)[0]
    d = distance(tip if rng.random() < 0.5 else edge) + 16 * noise(rng, 6, 3)
    front = 60 + 55 * severity - d  # > 0 in the dead area
    leaf = mix(leaf, [0.80, 0.72, 0.25], 0.9 * (front + 20) / 18)
    dead = np.array([0.40, 0.26, 0.14]) * rng.uniform(0.7, 1.35)
    zones = 1 + 0.13 * np.sin(d / 4) + 0.15 * noise(rng, 24)
    return mix(leaf, dead * zones[..., None], front / 5)


def draw_leaf(rng, sign):
    """A flat upright leaf with its disease: its colours (N x N x 3) and its opacity (N x N)."""
    shape = rng.choice(list(SHAPES))
    half, base, point = SHAPES[shape]
    half, bend = half * rng.uniform(0.85, 1.15), rng.uniform(-0.09, 0.09)
    veins = int(rng.integers(5, 9))  # pairs of side veins; a lobed leaf has two lobes less
    peak = (base / (base + point)) ** base * (point / (base + point)) ** point

    def at(t, s):
        """The point at t along the midrib (0 base, 1 tip) and s across it (-1 and 1 are the edges)."""
        t, s = np.broadcast_arrays(np.clip(t, 0, 1), s)
        width = half * t**base * (1 - t) ** point / peak
        if shape == "lobed":
            width = width * (0.48 + 0.52 * np.abs(np.sin(np.pi * (veins - 2) * t)) ** 0.7)
        if shape == "serrated":
            width = width * (0.93 + 0.17 * (veins * 2 * t % 1))
        xy = np.stack([0.5 + bend * np.sin(np.pi * t) + s * width, 0.86 - 0.80 * t], -1)
        return np.round(xy * N).astype(np.int32)

    t = np.linspace(0, 1, 150)
    blade = np.zeros((N, N))
    cv2.fillPoly(blade, [np.concatenate([at(t, 1), at(t[::-1], -1)])], 1.0)

    # colour: a green of its own, patches of another, lighter veins, the flesh bulging between them, a fold
    tone = rng.uniform(0, 3)
    green = np.array([np.interp(tone, range(4), c) for c in GREENS.T]) * rng.uniform([0.9, 0.9, 0.7], [1.15, 1.1, 1.4])
    leaf = green * (1 + 0.12 * noise(rng, 5, 4)[..., None])
    leaf = mix(leaf, GREENS[3], rng.uniform(0, 0.5) * (noise(rng, 3, 2) + 0.1))
    net = np.zeros((N, N))
    s = np.linspace(0, 1, 12)
    for start in np.linspace(0.04, 0.80, veins):
        for side in (-1, 1):
            cv2.polylines(net, [at(start + 0.17 * s**1.4, side * 0.95 * s)], False, 0.75, 2)
    cv2.polylines(net, [at(t, 0)], False, 1.0, 4)
    leaf = mix(leaf, green * 0.6 + [0.32, 0.34, 0.18], rng.uniform(0.4, 0.9) * blur(net, 0.8))
    leaf = sign(rng, leaf, blade, at(1, 0), rng.uniform(0, 1))
    leaf = leaf * (1 + rng.uniform(-0.12, 0.12) * np.tanh((X - np.interp(Y, *at(t[::-1], 0).T[::-1])) / 6)[..., None])
    leaf = leaf * (1.08 - 0.5 * blur(net, 5) + 0.3 * blur(net, 1))[..., None]

    # distractions, alike in all the classes: soil, shine, a drop of water, holes eaten by an insect
    if rng.random() < 0.25:
        n = int(rng.integers(2, 8))
        leaf = mix(leaf, [0.20, 0.15, 0.11], 0.8 * blur(discs(places(rng, blade, n), rng.uniform(1, 3, n)), 0.8))
    if rng.random() < 0.25:
        band = np.exp(-(((X + Y - places(rng, blade, 1).sum()) / 20) ** 2))
        leaf = mix(leaf, [0.85, 0.92, 0.90], rng.uniform(0.15, 0.35) * band)
    if rng.random() < 0.25:
        p, r = places(rng, blade, 1)[0], rng.uniform(7, 12)
        leaf = mix(leaf, leaf * 0.6, blur(discs([p + 2], [r + 1]), 1.5))
        leaf = mix(leaf, leaf * 1.25 + 0.08, blur(discs([p], [r]), 1))
        leaf = mix(leaf, [1, 1, 1], blur(discs([p - r * 0.35], [r * 0.3]), 0.8))
    hole = discs(places(rng, blade, 3), rng.uniform(3, 9, 3)) * (rng.random() < 0.25)
    stalk, curve = np.zeros((N, N)), at(0, 0) + [[0, 0], [-bend * 100, 18], [-bend * 256, 32]]
    cv2.polylines(stalk, [curve.astype(np.int32)], False, 1.0, 5)
    leaf = mix(leaf, green * 0.6 + [0.25, 0.24, 0.10], stalk * (1 - blade))
    return leaf, blur(np.maximum(blade * (1 - hole), stalk), 0.7)


def background(rng):
    """Soil, sky, grass, a table or something far out of focus."""
    kind = rng.choice(["soil", "sky", "grass", "table", "blur"])
    if kind == "soil":
        earth = np.array([0.42, 0.30, 0.20]) * rng.uniform(0.6, 1.3) * (1 + 0.35 * noise(rng, 12, 4)[..., None])
        n = int(rng.integers(10, 40))
        points, radii = rng.uniform(0, N, (n, 2)), rng.uniform(2, 8, n)
        earth = mix(earth, earth * 0.4, blur(discs(points + 2, radii + 1), 1.5))
        return mix(earth, np.array([0.55, 0.46, 0.38]) * (1 + 0.2 * noise(rng, 30)[..., None]), discs(points, radii))
    if kind == "sky":
        sky = mix(np.array([0.30, 0.53, 0.85]) * rng.uniform(0.8, 1.1), [0.75, 0.85, 0.95], Y / N)
        return mix(sky, [0.97, 0.97, 0.98], 1.2 * noise(rng, 3, 4) - rng.uniform(-0.2, 0.6))
    if kind == "grass":
        grass = np.zeros((N, N, 3)) + [0.12, 0.20, 0.07]
        for i in range(300):
            x, foot, lean, tall = *rng.uniform(0, 1.3 * N, 2), rng.normal(0, 22), rng.uniform(40, 110)
            blade = np.array([[x - 3, foot], [x + 3, foot], [x + lean, foot - tall]], np.int32)
            cv2.fillPoly(grass, [blade], tuple(GREENS[rng.integers(4)] * rng.uniform(0.4, 0.9)))
        return blur(grass, rng.uniform(2, 5))
    if kind == "table":
        wood = np.array([[0.62, 0.45, 0.28], [0.45, 0.30, 0.18], [0.80, 0.76, 0.70]])[rng.integers(3)]
        grain = cv2.resize(noise(rng, 6, 6)[:, :40], (N, N), interpolation=cv2.INTER_CUBIC)  # stretched along x
        planks = (np.arange(N) + rng.integers(64)) % 84 < 3
        return wood * (1 + 0.18 * grain - 0.5 * planks[:, None])[..., None]
    far = np.zeros((N, N, 3)) + GREENS[rng.integers(3)] * 0.7
    for i in range(14):
        colour = [GREENS[3], GREENS[1], [0.50, 0.38, 0.25], [0.78, 0.80, 0.78], [0.75, 0.48, 0.20]][rng.integers(5)]
        far = mix(far, colour, rng.uniform(0.2, 0.7) * discs([rng.uniform(0, N, 2)], [rng.uniform(12, 45)]))
    return blur(far, rng.uniform(4, 12))


def lay(rng, picture, leaf, alpha, scale, shift):
    """Lay a leaf on the picture: any rotation, some perspective, and the shadow it casts."""
    angle, corners = rng.uniform(0, 2 * np.pi), np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = (corners + rng.uniform(-0.16, 0.16, (4, 2))) @ turn * scale * N / 2 + N / 2 + shift
    pose = cv2.getPerspectiveTransform(((corners + 1) * N / 2).astype(np.float32), target.astype(np.float32))
    leaf, alpha = cv2.warpPerspective(leaf, pose, (N, N)), cv2.warpPerspective(alpha, pose, (N, N))
    shade = np.roll(blur(alpha, rng.uniform(2, 9)), rng.integers(-9, 10, 2), (0, 1))
    return mix(mix(picture, picture * 0.35, 0.8 * shade), leaf, alpha)


def draw(rng, name):
    """One picture of a class, SIZE x SIZE x 3 in RGB, uint8."""
    picture = background(rng)
    if rng.random() < 0.25:  # a second leaf, healthy, half outside
        angle = rng.uniform(0, 2 * np.pi)
        away = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(90, 130)
        picture = lay(rng, picture, *draw_leaf(rng, healthy), rng.uniform(0.6, 0.9), away)
    leaf, alpha = draw_leaf(rng, globals()[name])
    picture = lay(rng, picture, leaf, alpha, rng.uniform(0.95, 1.20), rng.uniform(-14, 14, 2))
    # light: warm or cold, bright or dim, stronger on one side, sometimes the shadow of something else
    warm, angle = rng.uniform(-0.10, 0.10), rng.uniform(0, 2 * np.pi)
    picture = picture * [1 + warm, 1, 1 - warm] * rng.uniform(0.8, 1.25)
    across = (X / N - 0.5) * np.cos(angle) + (Y / N - 0.5) * np.sin(angle)
    picture = picture * (1 + rng.uniform(0, 0.6) * across)[..., None]
    if rng.random() < 0.2:
        picture = picture * (1 - 0.4 * blur((across + 0.08 * noise(rng, 4) > 0.12) * 1.0, 4))[..., None]
    # camera: a little out of focus, a tone curve, grain
    picture = cv2.resize(blur(picture, rng.uniform(0.5, 2.2)), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.8, 1.1)
    picture = picture + rng.normal(0, rng.uniform(0.005, 0.022), picture.shape)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-class", type=int, default=120)
    parser.add_argument("--out", default="data_samples/leaves.zip")
    args = parser.parse_args()
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_STORED) as archive:  # JPEG does not compress further
        for name in sorted(CLASSES):
            for i in range(1, args.per_class + 1):
                picture = draw(np.random.default_rng([args.seed, CLASSES.index(name), i]), name)
                jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
                entry = zipfile.ZipInfo(f"{name}/{name}_{i:04d}.jpg")  # dated 1980-01-01
                entry.create_system = 3  # Unix, whatever the system
                archive.writestr(entry, jpeg)
    print(f"{args.out}: {len(CLASSES)} classes of {args.per_class} pictures")


if __name__ == "__main__":
    main()
