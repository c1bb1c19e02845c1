// What KV must hold: a function of model, tenant, shard, layer, plane, head and all tokens up to the position.

const BASE = 2166136261;

/** @param {number} hash @param {number} value */
function mix(hash, value) {
	let h = Math.imul(hash ^ value, 0x85ebca6b);
	h ^= h >>> 13;
	h = Math.imul(h, 0xc2b2ae35);
	return (h ^ (h >>> 16)) >>> 0;
}

/** @param {string} text */
function textHash(text) {
	return [...text].reduce((hash, c) => mix(hash, c.codePointAt(0) ?? 0), BASE);
}

/** The tokens of a request, and for each position a state that depends on all before it. */
export class Sequence {
	/** @type {number[]} */
	tokens = [];
	/** @type {number[]} */
	#high = [];
	/** @type {number[]} */
	#low = [];

	/** @param {string} model @param {string} salt @param {Iterable<number>} tokens */
	constructor(model, salt, tokens) {
		this.root = textHash(`${model}\n${salt}`);
		for (const token of tokens) {
			this.push(token);
		}
	}

	get length() {
		return this.tokens.length;
	}

	/** @param {number} token */
	push(token) {
		const last = this.tokens.length - 1;
		this.#high.push(mix(this.#high[last] ?? this.root, token + 1));
		this.#low.push(mix(this.#low[last] ?? ~this.root >>> 0, (token + 1) * 77));
		this.tokens.push(token);
	}

	/** Names the tokens up to a position, their model and tenant. @param {number} position */
	key(position) {
		const [high = 0, low = 0] = [this.#high[position], this.#low[position]];
		return high * 2 ** 20 + (low >>> 12);
	}

	/** 32 bits of the state at a position. @param {number} position */
	state(position) {
		return /** @type {number} */ (this.#high[position]);
	}

	/** What a model would say next. */
	nextToken() {
		return this.state(this.length - 1) % 5;
	}
}

/** One worker's KV pool. */
export class Memory {
	/** @type {Record<string, Uint32Array>} */
	layers = {};
	#shard;
	#heads;
	#planes;

	/**
	 * @param {{ numBlocks: number, blockSize: number, numLayers: number, planes: "separate" | "fused" | "latent", kvLayout: "NHD" | "HND" }} shape
	 * @param {number} shard
	 */
	constructor(shape, shard) {
		this.shape = shape;
		this.#shard = shard;
		this.#heads = shape.planes === "latent" ? 1 : 2;
		this.#planes = shape.planes === "latent" ? 1 : 2;
		for (let layer = 0; layer < shape.numLayers; layer++) {
			this.layers[`layer.${layer}`] = new Uint32Array(
				shape.numBlocks * shape.blockSize * this.#heads * this.#planes,
			).fill(0xdead);
		}
		this.arrays = Object.values(this.layers);
	}

	get layout() {
		const { numBlocks, blockSize, planes, kvLayout } = this.shape;
		return {
			numBlocks,
			blockSize,
			planes,
			kvLayout,
			numKvHeads: this.#heads,
			headSize: 1,
			dtype: "float32",
		};
	}

	/** @param {number} block @param {number} token @param {number} plane @param {number} head */
	#at(block, token, plane, head) {
		const { numBlocks, blockSize, planes, kvLayout } = this.shape;
		const heads = this.#heads;
		const row =
			kvLayout === "NHD"
				? (block * blockSize + token) * heads + head
				: (block * heads + head) * blockSize + token;
		return planes === "fused" ? row * 2 + plane : plane * numBlocks * blockSize * heads + row;
	}

	/** @param {number} state @param {number} layer @param {number} plane @param {number} head */
	#value(state, layer, plane, head) {
		return mix(state, 1 + head + 4 * plane + 16 * layer + 4096 * this.#shard);
	}

	/** Whether a position's KV is right. @param {number} state @param {number} block @param {number} token */
	holds(state, block, token) {
		for (let layer = 0; layer < this.arrays.length; layer++) {
			const array = /** @type {Uint32Array} */ (this.arrays[layer]);
			for (let plane = 0; plane < this.#planes; plane++) {
				for (let head = 0; head < this.#heads; head++) {
					if (
						array[this.#at(block, token, plane, head)] !== this.#value(state, layer, plane, head)
					) {
						return false;
					}
				}
			}
		}
		return true;
	}

	/**
	 * Computes a position's KV, or garbage when it is computed from garbage.
	 *
	 * @param {number} state @param {number} block @param {number} token @param {boolean} good
	 */
	compute(state, block, token, good = true) {
		for (let layer = 0; layer < this.arrays.length; layer++) {
			const array = /** @type {Uint32Array} */ (this.arrays[layer]);
			for (let plane = 0; plane < this.#planes; plane++) {
				for (let head = 0; head < this.#heads; head++) {
					const value = good ? this.#value(state, layer, plane, head) : 0xbad;
					array[this.#at(block, token, plane, head)] = value;
				}
			}
		}
	}

	/** Fills a block with garbage. @param {number} block */
	spoil(block) {
		for (let token = 0; token < this.shape.blockSize; token++) {
			this.compute(0, block, token, false);
		}
	}
}
