/**
 * The name among `known` that was meant: one that begins with `name`, or else the one that the fewest changed letters make
 * of it; undefined where these are more than half of its letters.
 */
export function nearest(name: string, known: readonly string[]): string | undefined {
	const longer = known.filter((other) => name !== "" && other.startsWith(name));
	const candidates = longer.length > 0 ? longer : known;
	const distances = candidates.map((other) => distance(name, other));
	const least = Math.min(...distances);
	const near = longer.length > 0 || least <= name.length / 2;
	return near ? candidates[distances.indexOf(least)] : undefined;
}

/**
 * What to say of a name that is none: the one that was meant, or all that there are.
 *
 * @param before What is written before each name.
 */
export function otherName(name: string, known: readonly string[], before = ""): string {
	const near = nearest(name, known);
	return near === undefined
		? `there are ${known.map((other) => `${before}${other}`).join(", ")}`
		: `did you mean ${before}${near}?`;
}

/** Levenshtein's: letters added, left out or replaced. */
export function distance(from: string, to: string): number {
	let row = Array.from({ length: to.length + 1 }, (_, at) => at);
	for (const [above, letter] of [...from].entries()) {
		const next = [above + 1];
		for (const [at, other] of [...to].entries()) {
			const replaced = (row[at] ?? 0) + (letter === other ? 0 : 1);
			next.push(Math.min(replaced, (row[at + 1] ?? 0) + 1, (next[at] ?? 0) + 1));
		}
		row = next;
	}
	return row[to.length] ?? 0;
}
