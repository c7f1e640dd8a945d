// Prepares an image as it was prepared for training: squashed to a square by Pillow's bicubic filter, then normalised.

const PRECISION = 2 ** 22; // Pillow's fixed-point weights

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// For each of `to` output pixels: the first of the `from` input pixels it reads, and their weights.
function weights(from, to) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, at) => {
    const center = (at + 0.5) * scale;
    const first = Math.max(Math.trunc(center - 2 * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + 2 * stretch + 0.5), from);
    const raw = Array.from({ length: end - first }, (_, k) => bicubic((k + first - center + 0.5) / stretch));
    const sum = raw.reduce((total, value) => total + value, 0);
    return { first, weights: raw.map((value) => Math.trunc((value / sum) * PRECISION + (value < 0 ? -0.5 : 0.5))) };
  });
}

// Resizes one axis of RGB pixels; both passes round to whole numbers in 0..255, as Pillow's do.
function pass(pixels, lines, from, to, lineStep, step, outLineStep, outStep) {
  const out = new Uint8Array(lines * to * 3);
  const table = weights(from, to);
  for (let line = 0; line < lines; line++) {
    table.forEach(({ first, weights: each }, at) => {
      for (let channel = 0; channel < 3; channel++) {
        let sum = PRECISION / 2;
        each.forEach((weight, k) => (sum += weight * pixels[line * lineStep + (first + k) * step + channel]));
        out[line * outLineStep + at * outStep + channel] = Math.min(Math.max(Math.floor(sum / PRECISION), 0), 255);
      }
    });
  }
  return out;
}

// RGB bytes [height, width, 3] -> RGB bytes [side, side, 3].
export function squash(pixels, width, height, side) {
  const wide = pass(pixels, height, width, side, width * 3, 3, side * 3, 3);
  return pass(wide, side, height, side, 3, side * 3, 3, side * 3);
}

// RGB bytes [side, side, 3] -> float32 [3, side, side].
export function normalise(pixels, side, mean, std) {
  const values = new Float32Array(3 * side * side);
  for (let at = 0; at < side * side; at++) {
    for (let channel = 0; channel < 3; channel++) {
      values[channel * side * side + at] = (pixels[at * 3 + channel] / 255 - mean[channel]) / std[channel];
    }
  }
  return values;
}
