// Prompts whose content says what it is, so that every byte that comes back can be checked.

/**
 * `chunks` whole chunks of a prompt that no other `first` shares a chunk with.
 *
 * @param {number} chunkSize
 * @param {number} first
 * @param {number} chunks
 */
export function tokens(chunkSize, first, chunks) {
	return Uint32Array.from({ length: chunks * chunkSize }, (_, at) => first * 1_000_000 + at);
}

/**
 * The bytes of one chunk.
 *
 * @param {number} first
 * @param {number} chunk
 * @param {number} bytes
 */
export function payload(first, chunk, bytes) {
	return new Uint8Array(Buffer.alloc(bytes, `prompt ${first} chunk ${chunk};`));
}
