// Engines whose KV memory is a GPU's. What they compute is mirrored here: before a copy its blocks are written to the
// device as far as they have changed, on the stream that the engine computes on; after a load they are read from there.

/** The device that all engines of a run share. */
export class Device {
	/** By address. @type {Map<bigint, { mirror: Uint8Array, written: Uint8Array, blockBytes: number }>} */
	#arrays = new Map();
	/** @type {bigint[]} */
	#allocations = [];

	/** @param {any} addon The simulator's. */
	constructor(addon) {
		this.addon = addon;
		this.stream = addon.simulatorCudaStream();
		this.before = addon.simulatorCudaViolations();
	}

	/** A worker's memory on the device, to be registered. @param {import("./content.mjs").Memory} memory */
	cachesOf({ layers, layout }) {
		const caches = Object.entries(layers).map(([name, mirror]) => {
			const { byteLength } = mirror;
			const pointer = this.addon.simulatorCudaAllocate(byteLength);
			this.addon.simulatorCudaWrite(pointer, new Uint8Array(byteLength));
			this.#allocations.push(pointer);
			const arrays = layout.planes === "separate" ? 2 : 1;
			for (let array = 0; array < arrays; array++) {
				const at = (array * byteLength) / arrays;
				const bytes = new Uint8Array(mirror.buffer, at, byteLength / arrays);
				this.#arrays.set(pointer + BigInt(at), {
					mirror: bytes,
					written: new Uint8Array(bytes.length),
					blockBytes: bytes.length / layout.numBlocks,
				});
			}
			return [name, { pointer, byteLength }];
		});
		const { stream } = this;
		return { caches: Object.fromEntries(caches), layout: { ...layout, device: "cuda", stream } };
	}

	/** @param {BigUint64Array} addresses */
	mirrors(addresses) {
		return [...addresses].map((address) => this.#of(address).mirror);
	}

	/** What was computed: on the device some time after the call. @param {BigUint64Array} addresses @param {Uint32Array} blocks */
	write(addresses, blocks) {
		for (const [address, at, size] of this.#blocks(addresses, blocks)) {
			const { mirror, written } = this.#of(address);
			const computed = mirror.subarray(at, at + size);
			const before = written.subarray(at, at + size);
			if (Buffer.compare(computed, before) !== 0) {
				before.set(computed);
				this.addon.simulatorCudaWrite(address + BigInt(at), computed);
			}
		}
	}

	/** What is computed on next. @param {BigUint64Array} addresses @param {Uint32Array} blocks */
	read(addresses, blocks) {
		for (const [address, at, size] of this.#blocks(addresses, blocks)) {
			const { mirror, written } = this.#of(address);
			this.addon.simulatorCudaRead(address + BigInt(at), mirror.subarray(at, at + size));
			written.set(mirror.subarray(at, at + size), at);
		}
	}

	/** @param {BigUint64Array} addresses @param {Uint32Array} blocks @returns {Generator<[bigint, number, number]>} */
	*#blocks(addresses, blocks) {
		for (const address of addresses) {
			const { blockBytes } = this.#of(address);
			for (const block of new Set(blocks)) {
				yield [address, block * blockBytes, blockBytes];
			}
		}
	}

	/** @param {bigint} address */
	#of(address) {
		const array = this.#arrays.get(address);
		if (array === undefined) {
			throw new Error(`nothing is allocated at ${address}`);
		}
		return array;
	}

	/** Frees everything; how many rules of CUDA were broken. */
	close() {
		for (const pointer of this.#allocations.splice(0)) {
			this.addon.simulatorCudaFree(pointer);
		}
		return this.addon.simulatorCudaViolations() - this.before;
	}
}
