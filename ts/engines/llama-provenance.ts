import type { EngineSequence } from "./node-llama-cpp.js";

type Tokens = ArrayLike<number>;

/** A sequence as it was when it was last looked at. */
interface Sighting {
	/** The tokens that it held. */
	readonly context: Tokens;
	/** How many of them, from the first, had state that was computed from exactly these tokens. */
	readonly sound: number;
	/** The tokens that its sequence's meter had counted. */
	readonly metered: number;
	/** The prompt that was going to be evaluated. */
	readonly announced: Tokens;
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
		announced?: Tokens,
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
	markLoaded(sequence: EngineSequence, salt: string, announced: Tokens): void {
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

function soundTokens(context: Tokens, kept: number, meter: number, last: Sighting): number {
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

/** Whether some end of what followed `kept` in `before` stands at `kept` now. */
function isShifted(context: Tokens, kept: number, before: Tokens): boolean {
	// Knuth, Morris and Pratt: linear, whatever the tokens repeat.
	const moved: number[] = [];
	for (let i = kept; i < context.length && i < before.length; i++) {
		moved.push(context[i] as number);
	}
	const borders = [0];
	for (let i = 1, border = 0; i < moved.length; i++) {
		border = step(moved, borders, border, moved[i] as number);
		borders.push(border);
	}
	let matched = 0;
	for (let i = kept + 1; i < before.length; i++) {
		matched = step(moved, borders, matched, before[i] as number);
	}
	return matched > 0;
}

/** How much of `pattern` ends at `next`, when `matched` of it ended before. */
function step(pattern: Tokens, borders: Tokens, matched: number, next: number): number {
	let length = matched;
	while (length > 0 && pattern[length] !== next) {
		length = borders[length - 1] as number;
	}
	return pattern[length] === next ? length + 1 : length;
}

function metered({ tokenMeter }: EngineSequence): number {
	return tokenMeter.usedInputTokens + tokenMeter.usedOutputTokens;
}

function commonPrefix(left: Tokens, right: Tokens): number {
	let length = 0;
	while (length < left.length && length < right.length && left[length] === right[length]) {
		length++;
	}
	return length;
}
