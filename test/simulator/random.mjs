// Numbers that only depend on a seed.

/** A generator of numbers (sfc32). */
export class Random {
	#state;

	/** @param {number} seed */
	constructor(seed) {
		this.#state = Uint32Array.of(seed, seed ^ 0x9e3779b9, (seed / 2 ** 32) >>> 0, 1);
		for (let i = 0; i < 16; i++) {
			this.next();
		}
	}

	/** 0 to 2^32 - 1. */
	next() {
		const s = this.#state;
		const [a, b, c, d] = /** @type {[number, number, number, number]} */ (
			/** @type {unknown} */ (s)
		);
		const sum = (a + b + d) >>> 0;
		s[3] = d + 1;
		s[0] = b ^ (b >>> 9);
		s[1] = c + (c << 3);
		s[2] = ((c << 21) | (c >>> 11)) + sum;
		return sum;
	}

	/** Whether something of this probability happens. @param {number} probability */
	chance(probability) {
		return this.next() < probability * 2 ** 32;
	}

	/** An integer from `min` to `max`. @param {number} min @param {number} max */
	integer(min, max) {
		return min + (this.next() % (max - min + 1));
	}

	/** @template T @param {readonly T[]} choices @returns {T} */
	pick(choices) {
		return /** @type {T} */ (choices[this.integer(0, choices.length - 1)]);
	}
}
