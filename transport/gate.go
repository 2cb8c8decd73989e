package transport

import "context"

// An Identity is what a hub says to somebody who shows credentials.
type Identity struct {
	Site Site
	Hub  string // its id
	Node string // whom the credentials name; "" where the hub asks for none
}

// A Gate is a Handler that knows a peer by its credentials. A carrier that can
// asks it before it takes anything else of the peer.
type Gate interface {
	// Admit checks the credentials. Errors are those of Handler.Accept: a
	// [*ByeError] with CodeAuth for credentials that are not good.
	Admit(ctx context.Context, peer Peer) (*Identity, error)
}

type peerKey struct{}

// WithPeer returns a context, for [Run], that holds the peer of a session.
func WithPeer(ctx context.Context, peer Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, peer)
}

// PeerOf returns the peer of the session that ctx, as a Handler's Serve gets it,
// is of; the zero Peer where the carrier does not say.
func PeerOf(ctx context.Context) Peer {
	peer, _ := ctx.Value(peerKey{}).(Peer)
	return peer
}
