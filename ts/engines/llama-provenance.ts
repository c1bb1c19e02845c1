import type { EngineSequence } from "./node-llama-cpp.js";

/** A sequence as it was when it was last looked at. */
interface Sighting {
	/** The tokens that it held. */
	readonly context: readonly number[];
	/** How many of them, from the first, had state that was computed from exactly these tokens. */
	readonly sound: number;
	/** The tokens that its sequence's meter had counted. */
	readonly metered: number;
	/** The prompt that was going to be evaluated. */
	readonly announced: readonly number[];
	/** How many leading tokens the cache holds, for tokens of this salt. */
	readonly cached: number;
	readonly salt: string;
}

const UNSEEN: Sighting = {
	context: [],
	sound: 0,
	metered: 0,
	announced: [],
	cached: 0,
	salt: "",
};

/**
 * Knows which of a sequence's tokens may be stored. A context shift erases tokens and moves those behind
 * them: their state still carries what was erased, so it belongs to no prefix that tokens could
 * name. The engine does not tell, but its token meter and the tokens themselves do.
 */
export class Provenance {
	readonly #sightings = new WeakMap<EngineSequence, Sighting>();

	/**
	 * Looks at a sequence, before or after evaluating.
	 *
	 * @param announced The tokens that will be evaluated, from the first; default those of the last sighting.
	 * @returns How many leading tokens may be stored, and how many of them the cache already holds.
	 */
	look(
		sequence: EngineSequence,
		salt: string,
		announced?: readonly number[],
	): { sound: number; cached: number } {
		const last = this.#sightings.get(sequence) ?? UNSEEN;
		const context = sequence.contextTokens;
		const kept = commonPrefix(context, last.context);
		const cached = last.salt === salt ? Math.min(last.cached, kept) : 0;
		const now = {
			context,
			sound: soundTokens(context, kept, metered(sequence), last),
			metered: metered(sequence),
			announced: announced ?? last.announced,
			cached,
			salt,
		};
		this.#sightings.set(sequence, now);
		return { sound: now.sound, cached };
	}

	/** Remembers that the cache holds the sequence's leading `tokens` tokens. */
	markCached(sequence: EngineSequence, salt: string, tokens: number): void {
		const last = this.#sightings.get(sequence) ?? UNSEEN;
		this.#sightings.set(sequence, { ...last, cached: tokens, salt });
	}

	/** Remembers that the sequence was filled from the cache, and with nothing else. */
	markLoaded(sequence: EngineSequence, salt: string, announced: readonly number[]): void {
		const context = sequence.contextTokens;
		this.#sightings.set(sequence, {
			context,
			sound: context.length,
			metered: metered(sequence),
			announced,
			cached: context.length,
			salt,
		});
	}
}

function soundTokens(
	context: readonly number[],
	kept: number,
	meter: number,
	last: Sighting,
): number {
	if (kept > last.sound) {
		return last.sound;
	}
	const grown = context.length - kept;
	// The meter counts shifted tokens too, so a shift of what was there before has to be seen itself.
	if (meter - last.metered === grown && !isShifted(context, kept, last.context)) {
		return context.length;
	}
	return Math.max(kept, commonPrefix(context, last.announced));
}

/** Whether the end of `before` has moved forward to `kept`. */
function isShifted(context: readonly number[], kept: number, before: readonly number[]): boolean {
	for (let start = kept + 1; start < before.length; start++) {
		const length = before.length - start;
		let same = 0;
		while (same < length && before[start + same] === context[kept + same]) {
			same++;
		}
		if (same === length) {
			return true;
		}
	}
	return false;
}

function metered({ tokenMeter }: EngineSequence): number {
	return tokenMeter.usedInputTokens + tokenMeter.usedOutputTokens;
}

function commonPrefix(left: readonly number[], right: readonly number[]): number {
	let length = 0;
	while (length < left.length && length < right.length && left[length] === right[length]) {
		length++;
	}
	return length;
}
