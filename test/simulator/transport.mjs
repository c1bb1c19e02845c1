// Between connectors and store: replies that are late or lost, restarts, and what must hold of every answer.

/** @typedef {import("../../ts/native-binding.js")} Native */
/** @typedef {import("./random.mjs").Random} Random */

/** What must never be. */
export class Violation extends Error {}

/** A failure of the transport, as a client's. */
function lost() {
	return Object.assign(new Error("TIMEOUT: the simulated reply was lost"), { code: "TIMEOUT" });
}

/**
 * A server as adapters see it (`via`), that can be restarted, with the faults of a network.
 */
export class Transport {
	/** Counts restarts. */
	epoch = 0;
	/** Counts jumps of the clock that end leases. */
	jumps = 0;
	/**
	 * Chunks, and of each the ranks that surely have it, that may have it, and that were ever given room for it.
	 *
	 * @type {Map<string, { ranks: Set<number>, maybe: Set<number>, granted: Set<number>, evicted: number }>}
	 */
	#stored = new Map();
	/**
	 * The leases of each request, by a plain model: of each of its chunks so many.
	 *
	 * @type {Map<string, { epoch: number, jumps: number, lookups: number, each: number, chunks: number[] }>}
	 */
	#leased = new Map();
	#busy = 0;
	#server;
	#world;

	/**
	 * @param {import("../../ts/index.js").Server} server
	 * @param {import("./world.mjs").World} world
	 */
	constructor(server, world) {
		this.#server = server;
		this.#world = world;
		this.chunkSize = server.chunkSize;
	}

	get server() {
		return this.#server;
	}

	/** @param {import("../../ts/index.js").Server} server */
	restart(server) {
		this.#server = server;
		this.epoch++;
		this.#stored.clear();
	}

	/** What is in use stays; nobody knows here what that is. */
	forget() {
		for (const { ranks } of this.#stored.values()) {
			ranks.clear();
		}
	}

	#evicted() {
		return Number(this.#server.status().evicted_objects);
	}

	/**
	 * Does something now and tells its result later, or never: then it is undone, as a client does it.
	 *
	 * @template T
	 * @param {() => Promise<T>} work
	 * @param {(result: T) => unknown} undo
	 * @returns {Promise<T>}
	 */
	async #call(work, undo) {
		const { random, faults } = this.#world;
		if (random.chance(faults.lostRequest)) {
			await this.#world.ticks(random.integer(1, 6));
			throw lost();
		}
		const result = await this.#now(work);
		if (random.chance(faults.stall)) {
			this.#world.jump();
			await this.#world.ticks(random.integer(5, 15));
		} else if (random.chance(faults.late)) {
			await this.#world.ticks(random.integer(1, 6));
		}
		if (random.chance(faults.lostReply)) {
			await this.#now(async () => undo(result));
			throw lost();
		}
		return result;
	}

	/**
	 * The server has done it at once; the model has, when this has ended.
	 *
	 * @template T
	 * @param {() => Promise<T>} work
	 * @returns {Promise<T>}
	 */
	async #now(work) {
		this.#busy++;
		try {
			return await work();
		} finally {
			this.#busy--;
		}
	}

	/**
	 * Does something now that cannot be undone, and tells its result later, or never.
	 *
	 * @template T
	 * @param {() => Promise<T>} work
	 * @returns {Promise<T>}
	 */
	async #end(work) {
		const { random, faults } = this.#world;
		const result = await this.#now(work);
		if (random.chance(faults.late)) {
			await this.#world.ticks(random.integer(1, 6));
		}
		if (random.chance(faults.lostReply)) {
			throw lost();
		}
		return result;
	}

	/** @param {string} id */
	#leasesOf(id) {
		const leased = this.#leased.get(id);
		const held = leased?.epoch === this.epoch && leased.jumps === this.jumps ? leased : undefined;
		return held?.chunks.reduce((sum, count) => sum + count, 0) ?? 0;
	}

	/** The server's leases are those of the model. */
	#checkLeases() {
		if (this.#busy > 0) {
			return;
		}
		const expected = [...this.#leased.keys()].reduce((sum, id) => sum + this.#leasesOf(id), 0);
		const { leases } = this.#server.status();
		if (leases !== expected) {
			throw this.#world.fail(
				`the server has ${leases} leases, and ${expected} were taken and not ended`,
			);
		}
	}

	/** A request holds just so many chunks. @param {string} id @param {number} chunks */
	checkHeld(id, chunks) {
		this.#checkLeases();
		const leased = this.#leased.get(id);
		if (
			this.#busy === 0 &&
			leased?.lookups === 1 &&
			leased.epoch === this.epoch &&
			leased.jumps === this.jumps
		) {
			const leases = this.#leasesOf(id);
			if (leases !== chunks * leased.each) {
				throw this.#world.fail(
					`${id} holds ${leases} leases, where ${chunks} chunks with ${leased.each} each are to be loaded`,
				);
			}
		}
	}

	/** Counts what ended a copy, if it was a call of CUDA. @param {unknown} error */
	#countFailure(error) {
		if (error instanceof Error && error.message.startsWith("CUDA_FAILED")) {
			this.#world.counts.failedCalls++;
		}
	}

	/** @param {import("../../ts/native-binding.js").PagedPlace} place */
	openScheduler(place) {
		/** @type {{ epoch: number, native: import("../../ts/native-binding.js").PagedScheduler } | undefined} */
		let opened;
		const native = () => {
			if (opened?.epoch !== this.epoch) {
				opened = { epoch: this.epoch, native: this.#server.openScheduler(place) };
			}
			return opened.native;
		};
		native();
		return {
			/** @param {Uint32Array} tokens @param {import("../../ts/native-binding.js").PagedRange} range */
			lookup: (tokens, range) => {
				const sequence = this.#world.sequenceOf(range.requestId);
				return this.#call(
					async () => {
						const expected = this.#expect(place, range, sequence);
						const { epoch, jumps } = this;
						const lookups = this.#world.random.chance(this.#world.faults.duplicate) ? 2 : 1;
						let chunks = 0;
						const each = place.kvWorldSize * place.numKvReaders;
						const before = this.#leased.get(range.requestId);
						const held = before?.epoch === epoch && before.jumps === jumps ? before.chunks : [];
						for (let i = 0; i < lookups; i++) {
							chunks = await native().lookup(tokens, range, 1000);
							for (let chunk = 0; chunk < chunks; chunk++) {
								held[chunk] = (held[chunk] ?? 0) + each;
							}
						}
						this.#check(range, chunks, expected);
						const all = lookups + (before?.lookups ?? 0);
						const leased = { epoch, jumps, lookups: all, each, chunks: held };
						this.#leased.set(range.requestId, leased);
						this.#world.counts.hitChunks += chunks;
						return chunks;
					},
					() => this.#endSession(native(), range.requestId),
				);
			},
			/** @param {Uint32Array} tokens @param {import("../../ts/native-binding.js").PagedRange} range */
			release: (tokens, range) =>
				this.#end(async () => {
					const leased = this.#leased.get(range.requestId);
					await native().release(tokens, range, 1000);
					const last = Math.min(leased?.chunks.length ?? 0, range.end / this.chunkSize);
					for (let chunk = range.start / this.chunkSize; chunk < last; chunk++) {
						const chunks = /** @type {number[]} */ (leased?.chunks);
						chunks[chunk] = Math.max(
							0,
							/** @type {number} */ (chunks[chunk]) - (leased?.each ?? 0),
						);
					}
				}),
			/** @param {string} requestId */
			endSession: (requestId) => this.#end(() => this.#endSession(native(), requestId)),
			clear: () => {
				this.forget();
				return native().clear(1000);
			},
		};
	}

	/** @param {import("../../ts/native-binding.js").PagedScheduler} native @param {string} id */
	async #endSession(native, id) {
		await native.endSession(id, 1000);
		this.#leased.delete(id);
	}

	/**
	 * Leading chunks that are stored by the plain model: surely, and perhaps.
	 *
	 * @param {import("../../ts/native-binding.js").PagedPlace} place
	 * @param {import("../../ts/native-binding.js").PagedRange} range
	 * @param {import("./content.mjs").Sequence} sequence
	 */
	#expect(place, range, sequence) {
		const evicted = this.#evicted();
		let [surely, perhaps] = [true, true];
		const expected = { least: 0, most: 0 };
		for (let end = this.chunkSize; end <= range.end && perhaps; end += this.chunkSize) {
			const known = this.#stored.get(`${place.modelName} ${sequence.key(end - 1)}`);
			const all = (/** @type {Set<number> | undefined} */ ranks) =>
				ranks?.size === place.kvWorldSize;
			perhaps &&= all(known?.maybe);
			surely &&= all(known?.ranks) && known?.evicted === evicted;
			expected.most += perhaps ? 1 : 0;
			expected.least += surely ? 1 : 0;
		}
		return expected;
	}

	/** @param {string} key */
	#known(key) {
		const known = this.#stored.get(key);
		if (known !== undefined) {
			return known;
		}
		const unknown = { ranks: new Set(), maybe: new Set(), granted: new Set(), evicted: 0 };
		this.#stored.set(key, unknown);
		return unknown;
	}

	/**
	 * Room is given for all that nobody stored, unless it is refused.
	 *
	 * @param {import("../../ts/native-binding.js").PagedRange} range
	 * @param {import("../../ts/native-binding.js").PagedStore} store
	 * @param {string[]} keys
	 * @param {number} workerId
	 */
	#checkGrant(range, store, keys, workerId) {
		const known = keys.map((key) => this.#known(key));
		const there = known.filter(({ granted }) => granted.has(workerId)).length;
		if (store.refused === 0 && store.chunks < keys.length - there) {
			throw this.#world.fail(
				`${range.requestId}: rank ${workerId} was given room for ${store.chunks} of ${keys.length} chunks, ` +
					`where only ${there} can be there`,
			);
		}
		for (const { granted } of known) {
			granted.add(workerId);
		}
	}

	/** @param {import("../../ts/native-binding.js").PagedRange} range @param {number} chunks @param {{ least: number, most: number }} expected */
	#check(range, chunks, { least, most }) {
		if (chunks > most) {
			throw this.#world.fail(
				`${range.requestId} hit ${chunks} chunks where at most ${most} were ever stored for its tenant`,
			);
		}
		if (chunks < least) {
			throw this.#world.fail(
				`${range.requestId} hit ${chunks} chunks where ${least} are stored, and nothing was evicted`,
			);
		}
	}

	/**
	 * @param {import("../../ts/native-binding.js").PagedPlace} place
	 * @param {number} workerId
	 * @param {import("../../ts/native-binding.js").PagedLayout} layout
	 */
	async openWorker(place, workerId, layout) {
		const open = () => this.#server.openWorker(place, workerId, layout, 1000);
		let worker = await open();
		let epoch = this.epoch;
		/** @type {Promise<void> | undefined} */
		let opening;
		/** A GPU's memory, if it is that. @type {[device: number, stream: bigint, addresses: BigUint64Array] | undefined} */
		let registered;
		/** As a client does after a restart: it registers again. */
		const current = async () => {
			while (epoch !== this.epoch) {
				const now = this.epoch;
				opening ??= open().then(async (opened) => {
					if (registered !== undefined) {
						await this.#world.copied(opened.registerCuda(...registered));
					}
					[worker, epoch, opening] = [opened, now, undefined];
				});
				await opening;
			}
			return worker;
		};
		/**
		 * A copy to or from a GPU's memory; resolves when it has ended, in one way or the other.
		 *
		 * @param {Uint32Array} blocks
		 * @param {() => void} start
		 * @param {() => Promise<undefined>} end
		 */
		const copied = (blocks, start, end) => {
			const device = /** @type {import("./device.mjs").Device} */ (this.#world.device);
			const [, , addresses] = /** @type {NonNullable<typeof registered>} */ (registered);
			device.write(addresses, blocks);
			try {
				start();
			} catch (error) {
				this.#countFailure(error);
				throw error;
			}
			const read = () => device.read(addresses, blocks);
			return this.#world.copied(this.#now(end)).then(
				() => {
					this.#world.counts.gpuCopies++;
					read();
				},
				(error) => {
					this.#countFailure(error);
					read();
				},
			);
		};
		/** @typedef {{ arrays: Uint8Array[], blocks: Uint32Array }} Copied */
		/** @type {WeakMap<object, { worker: import("../../ts/native-binding.js").PagedWorker, epoch: number, keys?: string[], filled?: Uint32Array, copied?: Copied, copying?: Promise<void> }>} */
		const grants = new WeakMap();
		const of = (/** @type {object} */ grant) => {
			const known = grants.get(grant);
			if (known === undefined) {
				throw new Error("a grant of another worker");
			}
			return known;
		};
		/** @param {import("../../ts/native-binding.js").PagedStore} store */
		const commit = async (store) => {
			const grant = of(store);
			await grant.copying;
			const whole = store.refused === 0;
			if (grant.epoch !== this.epoch) {
				await grant.worker.commit(store, 1000);
				return 0;
			}
			for (const key of grant.keys ?? []) {
				this.#known(key).maybe.add(workerId);
			}
			const evicted = this.#evicted();
			const chunks = await grant.worker.commit(store, 1000);
			this.#world.counts.storedChunks += chunks;
			for (const key of grant.keys ?? []) {
				const known = this.#stored.get(key);
				// Of a range that did not fit, or that another one is storing, nobody knows which are there.
				if (known !== undefined && whole && chunks === grant.keys?.length) {
					if (known.evicted !== evicted) {
						known.ranks.clear();
						known.evicted = evicted;
					}
					known.ranks.add(workerId);
				}
			}
			return chunks;
		};
		/** @param {import("../../ts/native-binding.js").PagedRange} range */
		const keysOf = (range) => {
			const sequence = this.#world.sequenceOf(range.requestId);
			/** @type {string[]} */
			const keys = [];
			for (let end = range.start + this.chunkSize; end <= range.end; end += this.chunkSize) {
				keys.push(`${place.modelName} ${sequence.key(end - 1)}`);
			}
			return keys;
		};
		/**
		 * A load or store by the addon itself; `ended` hears its chunks, or of an error.
		 *
		 * @param {Uint32Array} blocks
		 * @param {(native: import("../../ts/native-binding.js").PagedWorker) => import("../../ts/native-binding.js").PagedTransfer} begin
		 * @param {(chunks: number | undefined) => Promise<void>} ended
		 */
		const whole = (blocks, begin, ended) => {
			const device = /** @type {import("./device.mjs").Device} */ (this.#world.device);
			const [, , addresses] = /** @type {NonNullable<typeof registered>} */ (registered);
			const run = async (
				/** @type {import("../../ts/native-binding.js").PagedWorker} */ native,
			) => {
				const now = this.epoch;
				device.write(addresses, blocks);
				const transfer = begin(native);
				const copied = transfer.copied(2 ** 32 - 1).catch(() => {}); // its error is the end's
				/** @type {number | undefined} */
				let chunks;
				try {
					chunks = await transfer.ended();
					this.#world.counts.gpuCopies += chunks > 0 ? 1 : 0;
					return chunks;
				} catch (error) {
					this.#countFailure(error);
					throw error;
				} finally {
					await copied;
					device.read(addresses, blocks);
					if (now === this.epoch) {
						await ended(chunks);
					}
				}
			};
			const ending = current().then((native) => this.#world.copied(this.#now(() => run(native))));
			const copying = ending.then(
				() => undefined,
				() => undefined,
			);
			return { forbid: () => false, copied: () => copying, ended: () => ending };
		};
		const wrapped = {
			arrayBytes: worker.arrayBytes,
			/** @param {Uint32Array} tokens @param {import("../../ts/native-binding.js").PagedRange} range */
			load: (tokens, range) =>
				this.#call(
					async () => {
						const native = await current();
						const load = await native.load(tokens, range, 1000);
						grants.set(load, { worker: native, epoch });
						const leased = this.#leased.get(range.requestId);
						const first = range.start / this.chunkSize;
						for (let chunk = first; chunk < first + load.chunks; chunk++) {
							const chunks = /** @type {number[]} */ (leased?.chunks);
							chunks[chunk] = Math.max(0, /** @type {number} */ (chunks[chunk]) - 1);
						}
						if (load.chunks === 0 && leased?.epoch === this.epoch && leased.jumps === this.jumps) {
							throw this.#world.fail(
								`${range.requestId}: a chunk of ${range.start}..${range.end} is gone between lookup and load`,
							);
						}
						return load;
					},
					(load) => of(load).worker.finish(load, 1000),
				),
			/** @type {Native["PagedWorker"]["prototype"]["planLoad"]} */
			planLoad: (load, blocks, skip, verify) => {
				of(load).filled = blocks.subarray(Math.floor(skip / layout.blockSize));
				return of(load).worker.planLoad(load, blocks, skip, verify);
			},
			/** @type {Native["PagedWorker"]["prototype"]["copyIn"]} */
			copyIn: (load, arrays) => {
				const grant = of(load);
				grant.copied = { arrays, blocks: grant.filled ?? new Uint32Array() };
				return grant.worker.copyIn(load, arrays);
			},
			/** @type {Native["PagedWorker"]["prototype"]["registerCuda"]} */
			registerCuda: async (...memory) => {
				registered = memory;
				await worker.registerCuda(...memory);
			},
			/** @type {Native["PagedWorker"]["prototype"]["startIn"]} */
			startIn: (load) => {
				const grant = of(load);
				const arrays = this.#world.device?.mirrors(registered?.[2] ?? new BigUint64Array()) ?? [];
				const filled = grant.filled ?? new Uint32Array();
				grant.copied = { arrays, blocks: filled };
				const start = () => grant.worker.startIn(load);
				grant.copying = copied(filled, start, () => load.copied(2 ** 32 - 1));
			},
			/** @type {Native["PagedWorker"]["prototype"]["startOut"]} */
			startOut: (store) => {
				const grant = of(store);
				const start = () => grant.worker.startOut(store);
				grant.copying = copied(grant.filled ?? new Uint32Array(), start, () => store.copied());
			},
			/** @param {import("../../ts/native-binding.js").PagedLoad} load */
			finish: (load) =>
				this.#end(async () => {
					const grant = of(load);
					await grant.copying;
					const held = await grant.worker.finish(load, 1000);
					const { random, faults, counts } = this.#world;
					if (grant.copied !== undefined && random.chance(faults.reused)) {
						counts.reusedSlots++;
						overwrite(grant.copied, layout.numBlocks);
						return false;
					}
					// What a connection granted that has ended may have been used anew.
					return held && grant.epoch === this.epoch;
				}),
			/** @param {Uint32Array} tokens @param {import("../../ts/native-binding.js").PagedRange} range */
			store: (tokens, range) => {
				const keys = keysOf(range);
				return this.#call(
					async () => {
						const native = await current();
						const store = await native.store(tokens, range, 1000);
						grants.set(store, { worker: native, epoch, keys });
						this.#checkGrant(range, store, keys, workerId);
						this.#world.counts.refusedChunks += store.refused ?? 0;
						return store;
					},
					(store) => of(store).worker.abandon(store, 1000),
				);
			},
			/** @type {Native["PagedWorker"]["prototype"]["planStore"]} */
			planStore: (store, blocks, verify) => {
				of(store).filled = blocks;
				return of(store).worker.planStore(store, blocks, verify);
			},
			/** @type {Native["PagedWorker"]["prototype"]["copyOut"]} */
			copyOut: (store, arrays) => of(store).worker.copyOut(store, arrays),
			/** @param {import("../../ts/native-binding.js").PagedStore} store */
			commit: (store) => this.#end(() => commit(store)),
			/** @param {import("../../ts/native-binding.js").PagedStore} store */
			abandon: (store) =>
				this.#end(async () => {
					await of(store).copying;
					return of(store).worker.abandon(store, 1000);
				}),
			close: () => worker.close(1000),
			// By the addon itself; or in its steps, so that faults come between them.
			/** @type {Native["PagedWorker"]["prototype"]["loadBlocks"]} */
			loadBlocks: (tokens, range, { blocks, skip, verify }) => {
				if (this.#world.random.chance(0.5)) {
					const ended = async (/** @type {boolean} */ begun) => {
						const leased = this.#leased.get(range.requestId);
						const [first, last] = [range.start, range.end].map((at) => at / this.chunkSize);
						for (let chunk = Number(first); begun && chunk < Number(last); chunk++) {
							const chunks = /** @type {number[]} */ (leased?.chunks);
							chunks[chunk] = Math.max(0, /** @type {number} */ (chunks[chunk]) - 1);
						}
					};
					const filled = blocks.subarray(Math.floor(skip / layout.blockSize));
					return whole(
						filled,
						(native) => native.loadBlocks(tokens, range, { blocks, skip, verify }, 1000),
						(chunks) => ended(chunks !== 0),
					);
				}
				const load = wrapped.load(tokens, range);
				return transfer(load, async (load) => {
					let copying = false;
					try {
						copying = wrapped.planLoad(load, blocks, skip, verify);
						if (copying) {
							wrapped.startIn(load);
						}
					} finally {
						copying = (await wrapped.finish(load)) && copying;
					}
					return copying ? load.chunks : 0;
				});
			},
			/** @type {Native["PagedWorker"]["prototype"]["storeBlocks"]} */
			storeBlocks: (tokens, range, { blocks, verify }) => {
				if (this.#world.random.chance(0.5)) {
					const keys = keysOf(range).map((key) => this.#known(key));
					for (const { maybe, granted } of keys) {
						maybe.add(workerId);
						granted.add(workerId);
					}
					const evicted = this.#evicted();
					const ended = async (/** @type {number | undefined} */ chunks = 0) => {
						this.#world.counts.storedChunks += chunks;
						for (const known of chunks === keys.length ? keys : []) {
							if (known.evicted !== evicted) {
								known.ranks.clear();
								known.evicted = evicted;
							}
							known.ranks.add(workerId);
						}
					};
					return whole(
						blocks,
						(native) => native.storeBlocks(tokens, range, { blocks, skip: 0, verify }, 1000),
						ended,
					);
				}
				const store = wrapped.store(tokens, range);
				return transfer(store, async (store, forbidden) => {
					try {
						if (!forbidden) {
							wrapped.planStore(store, blocks, verify);
							wrapped.startOut(store);
						}
					} catch (error) {
						await wrapped.abandon(store);
						throw error;
					}
					if (forbidden) {
						await wrapped.abandon(store);
						return 0;
					}
					return await wrapped.commit(store);
				});
			},
		};
		return wrapped;
	}
}

/**
 * Steps as a transfer of the addon's.
 *
 * @template {import("../../ts/native-binding.js").PagedLoad | import("../../ts/native-binding.js").PagedStore} T
 * @param {Promise<T>} granting
 * @param {(grant: T, forbidden: boolean) => Promise<number>} go
 */
function transfer(granting, go) {
	let [asking, forbidden] = [true, false];
	/** @type {(copying: Promise<undefined>) => void} */
	let begun = () => {};
	/** @type {Promise<undefined>} */
	const copying = new Promise((resolve) => {
		begun = resolve;
	});
	const ended = granting.then((grant) => {
		asking = false;
		const ending = go(grant, forbidden);
		try {
			begun(grant.copied(2 ** 32 - 1).catch(() => undefined));
		} catch {
			// Nothing is copied: it would have begun by now.
		}
		return ending;
	});
	ended.then(
		() => begun(Promise.resolve(undefined)),
		() => begun(Promise.resolve(undefined)),
	);
	return {
		forbid: () => {
			forbidden ||= asking;
			const first = asking && forbidden;
			asking = false;
			return first;
		},
		copied: () => copying,
		ended: () => ended,
	};
}

/**
 * What a copy got from slots that were used anew meanwhile.
 *
 * @param {{ arrays: Uint8Array[], blocks: Uint32Array }} copied
 * @param {number} numBlocks
 */
function overwrite({ arrays, blocks }, numBlocks) {
	for (const array of arrays) {
		const size = array.length / numBlocks;
		for (const block of blocks) {
			array.fill(0xaa, block * size, (block + 1) * size);
		}
	}
}
