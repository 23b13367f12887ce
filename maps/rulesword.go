package maps

import "tcnat/bpf"

// rulesWord is the word config.rules. Its low bits, enum rules_word, are for the programs: the
// slot in force, and which kinds of rules there may be. The bits above are Go's own notes: what
// the next call has to finish when this one is killed, and which ids are free.
type rulesWord uint64

const (
	// wordSwitched: the other slot's rules were in force; flows of those that are gone have
	// to end.
	wordSwitched rulesWord = 1 << 17
	// wordUnruled: flows without a rule have to end, since an SNAT rule came or went.
	wordUnruled rulesWord = 1 << 18

	limitShift   = 19 // block with the last free id
	limitBits    = 7
	nextShift    = 26 // first free id, 0: none
	leavingShift = 43 // id of a rule that is being taken out, 0: none
	idBits       = 17

	// idBlock is the unit of the limit.
	idBlock = 1 << (idBits - limitBits)
)

// wordKinds are the bits that say which kinds of rules there may be.
const wordKinds = rulesWord(bpf.NATRulesWordRULES_DNAT_PORTS|bpf.NATRulesWordRULES_DNAT_RANGES)*
	(1<<bpf.NATDnatKindDNAT_KINDS-1) | rulesWord(bpf.NATRulesWordRULES_SNAT_DEVICE)

func (w rulesWord) slot() uint32 { return uint32(w & rulesWord(bpf.NATRulesWordRULES_SET)) }

// kinds are the bits of the kinds alone.
func (w rulesWord) kinds() rulesWord { return w & wordKinds }

// unfinished tells whether a call was killed before it had ended all the flows that it had to.
func (w rulesWord) unfinished() bool { return w != w.finished() }

// finished is w with nothing to finish.
func (w rulesWord) finished() rulesWord {
	return w.withLeaving(0) &^ (wordSwitched | wordUnruled)
}

// leaving is the id of the rule that is being taken out, or 0.
func (w rulesWord) leaving() uint32 { return w.field(leavingShift, idBits) }

func (w rulesWord) withLeaving(id uint32) rulesWord { return w.with(leavingShift, idBits, id) }

// withFree notes the ids from first up to, not including, last as free. last is a multiple of
// idBlock; none are free when first is 0.
func (w rulesWord) withFree(first, last uint32) rulesWord {
	if first == 0 {
		return w.with(nextShift, idBits, 0)
	}
	return w.with(nextShift, idBits, first).with(limitShift, limitBits, last/idBlock-1)
}

// takeID takes a free id; it is 0 when there is none.
func (w rulesWord) takeID() (rest rulesWord, id uint32) {
	id = w.field(nextShift, idBits)
	if id == 0 {
		return w, 0
	}
	next := id + 1
	if next%idBlock == 0 && next/idBlock > w.field(limitShift, limitBits) {
		next = 0
	}
	return w.with(nextShift, idBits, next), id
}

func (w rulesWord) field(shift, bits int) uint32 { return uint32(w>>shift) & (1<<bits - 1) }

func (w rulesWord) with(shift, bits int, value uint32) rulesWord {
	return w&^((1<<bits-1)<<shift) | rulesWord(value)<<shift
}

// freeIDs is the longest run of ids that are not used, as withFree takes it.
func freeIDs(used carried, limit uint32) (first, last uint32) {
	limit = min(limit, 1<<idBits) / idBlock * idBlock
	for id := uint32(1); id < limit; {
		if used.has(id) {
			id++
			continue
		}
		begin := id
		for id < limit && !used.has(id) {
			id++
		}
		if end := id / idBlock * idBlock; end > begin && end-begin > last-first {
			first, last = begin, end
		}
	}
	return first, last
}

// carried are the generations that ids carry in a set of rules, by id.
type carried []uint64

const isCarried = 1 << 32

func (c carried) has(id uint32) bool {
	return uint64(id) < uint64(len(c)) && c[id] != 0
}

// generation is that of an id that is there.
func (c carried) generation(id uint32) uint32 { return uint32(c[id]) }

func (c *carried) set(id, generation uint32) {
	if n := int(id) + 1 - len(*c); n > 0 {
		*c = append(*c, make(carried, n)...)
	}
	(*c)[id] = isCarried | uint64(generation)
}
